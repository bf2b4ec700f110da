"""Dividing examples among adapters by the similarity of their prompts, and the controls.

k-means on unit vectors (Euclidean, hence cosine), HDBSCAN on reduced dimensions, random groups and
task labels. Whatever the method, a cluster is represented by its centroid, which the router uses.

Symbols: N rows, D embedding width, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.cluster.embed import Embeddings
from tclora.config import ClusterConfig
from tclora.errors import DataError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

Labels = NDArray[np.int64]
NOISE = -1
_SILHOUETTE_ROWS = 5_000


@dataclass(frozen=True)
class Clustering:
    """Clusters of the training rows.

    Attributes
    ----------
    labels : ndarray of int64, shape (N,)
        Cluster of each training row, 0 … K-1, or -1 for dropped noise; 0 is the largest.
    centroids : ndarray of float32, shape (K, D)
        Unit-norm mean direction of each cluster.
    silhouette : float or None
        Mean silhouette (cosine) over at most 5000 rows; None where K = 1 or K = N.
    notices : tuple of str
        What was adjusted: merged small clusters, noise, the chosen K.
    """

    labels: Labels
    centroids: NDArray[np.float32]
    silhouette: float | None
    notices: tuple[str, ...]

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)


def cluster_rows(
    vectors: Embeddings,
    config: ClusterConfig,
    *,
    tasks: Sequence[str | None] | None = None,
    seed: int = 0,
) -> Clustering:
    """Cluster the training rows.

    Parameters
    ----------
    vectors : ndarray of float32, shape (N, D)
        Unit-norm embeddings.
    config : ClusterConfig
        Method and its settings.
    tasks : sequence of str or None, optional
        Labels of the rows, needed by method "task" only.
    seed : int
        Seed of initial centroids, samples and random groups.

    Returns
    -------
    Clustering

    Raises
    ------
    DataError
        If there are fewer rows than clusters, if HDBSCAN calls every row noise or finds fewer
        than two clusters, or if labels are missing for method "task".
    """
    notices: list[str] = []
    if config.method == "kmeans":
        labels = _kmeans(vectors, config, seed, notices)
    elif config.method == "hdbscan":
        labels = _hdbscan(vectors, config, seed, notices)
    elif config.method == "random":
        _check_k(len(vectors), config.k)
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(len(vectors)) % int(config.k))
    else:
        labels = _by_task(tasks)
    labels = _merge_small(vectors, labels, config.min_rows, notices)
    labels = _by_size(labels)
    return Clustering(
        labels, centroids(vectors, labels), silhouette(vectors, labels, seed), tuple(notices)
    )


def assign(vectors: Embeddings, centres: NDArray[np.float32]) -> tuple[Labels, NDArray[np.float32]]:
    """Return each row's nearest centroid and its cosine similarity to it.

    Parameters
    ----------
    vectors : ndarray, shape (N, D)
        Unit-norm embeddings.
    centres : ndarray, shape (K, D)
        Unit-norm centroids.
    """
    similarity = vectors @ centres.T  # (N, K)
    nearest = similarity.argmax(axis=1)
    return nearest, similarity[np.arange(len(vectors)), nearest]


def assign_held_out(
    nearest: Labels,
    tasks: Sequence[str | None],
    training_labels: Labels,
    training_tasks: Sequence[str | None],
    method: str,
    seed: int = 0,
) -> Labels:
    """Give held-out rows the cluster whose adapter answers for them.

    Parameters
    ----------
    nearest : ndarray of int64, shape (N,)
        Nearest centroid of each held-out row; right for clusters of similar prompts.
    tasks : sequence of N str or None
        Task labels of the held-out rows.
    training_labels, training_tasks
        Clusters and task labels of the training rows.
    method : str
        With "task", rows of a trained task go to its cluster; with "random", to a random one, as
        the training rows did.
    seed : int
        Seed of random groups.
    """
    if method == "random":
        groups = np.random.default_rng(seed + 1).permutation(np.arange(len(nearest)))
        return groups % (training_labels.max() + 1)
    if method == "task":
        cluster_of = dict(zip(training_tasks, training_labels.tolist(), strict=True))
        return np.array(
            [cluster_of.get(t, n) for t, n in zip(tasks, nearest, strict=True)], dtype=np.int64
        )
    return nearest


def centroids(vectors: Embeddings, labels: Labels) -> NDArray[np.float32]:
    """Return the unit-norm mean direction of every cluster, shape (K, D); noise does not count."""
    means = np.stack([vectors[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def silhouette(vectors: Embeddings, labels: Labels, seed: int = 0) -> float | None:
    """Mean silhouette by cosine distance over a sample; None where it is not defined."""
    from sklearn.metrics import silhouette_score

    kept = labels != NOISE
    distinct = len(np.unique(labels[kept]))
    if not 1 < distinct < kept.sum():
        return None
    size = min(_SILHOUETTE_ROWS, int(kept.sum()))
    sample = np.random.default_rng(seed).choice(np.flatnonzero(kept), size=size, replace=False)
    if not 1 < len(np.unique(labels[sample])) < size:
        return None
    return float(silhouette_score(vectors[sample], labels[sample], metric="cosine"))


def agreement(labels: Labels, tasks: Sequence[str | None]) -> tuple[float, float] | None:
    """Return the adjusted Rand index and normalised mutual information with task labels.

    Returns
    -------
    tuple of float or None
        (ARI, NMI) over the labelled rows that are in a cluster; None if no row is labelled.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    known = np.array([task is not None and not pd.isna(task) for task in tasks])
    kept = known & (labels != NOISE)
    if not kept.any():
        return None
    truth = np.asarray(tasks, dtype=object)[kept].astype(str)
    return (
        float(adjusted_rand_score(truth, labels[kept])),
        float(normalized_mutual_info_score(truth, labels[kept])),
    )


def map_2d(vectors: Embeddings, seed: int = 0) -> NDArray[np.float32]:
    """Project embeddings on their first two principal components, shape (N, 2)."""
    if len(vectors) < 3:
        return np.zeros((len(vectors), 2), dtype=np.float32)
    from sklearn.decomposition import PCA

    return PCA(2, random_state=seed).fit_transform(vectors).astype(np.float32)


def _check_k(n_rows: int, k: int | str) -> None:
    if int(k) > n_rows:
        raise DataError(
            f"cluster.k must be at most the number of training rows ({n_rows}), got {k}; "
            "lower cluster.k or read more rows"
        )


def _sample(vectors: Embeddings, limit: int, seed: int) -> Embeddings:
    if len(vectors) <= limit:
        return vectors
    rows = np.random.default_rng(seed).choice(len(vectors), size=limit, replace=False)
    return vectors[np.sort(rows)]


def _kmeans(vectors: Embeddings, config: ClusterConfig, seed: int, notices: list[str]) -> Labels:
    sample = _sample(vectors, config.fit_rows, seed)
    if config.k != "auto":
        _check_k(len(vectors), config.k)
        return _fit_kmeans(sample, int(config.k), seed).predict(vectors)
    low, high = max(2, config.k_range[0]), min(config.k_range[1], len(sample) - 1)
    if low > high:
        raise DataError(
            f"cluster.k_range must leave at least one K between 2 and N-1 = {len(sample) - 1}, "
            f"got {list(config.k_range)}"
        )
    fits = {k: _fit_kmeans(sample, k, seed) for k in range(low, high + 1)}
    scores = {k: silhouette(sample, fit.labels_, seed) or -1.0 for k, fit in fits.items()}
    best = max(scores, key=lambda k: scores[k])
    notices.append(f"K = {best} has the best silhouette ({scores[best]:.3f}) of {low} … {high}")
    return fits[best].predict(vectors)


def _fit_kmeans(vectors: Embeddings, k: int, seed: int) -> "KMeans":
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=10, random_state=seed).fit(vectors)


def _hdbscan(vectors: Embeddings, config: ClusterConfig, seed: int, notices: list[str]) -> Labels:
    """Fit on reduced dimensions (densities mean little in hundreds), assign all rows."""
    import hdbscan
    from sklearn.decomposition import PCA

    sample = _sample(vectors, config.fit_rows, seed)
    size = config.hdbscan_min_cluster_size
    if len(sample) < size:
        raise DataError(
            f"cluster.hdbscan_min_cluster_size must be at most the number of training rows "
            f"({len(sample)}), got {size}"
        )
    dimensions = min(config.hdbscan_dimensions, *sample.shape)
    reduced = PCA(dimensions, random_state=seed).fit_transform(sample)
    labels = hdbscan.HDBSCAN(min_cluster_size=size).fit_predict(reduced)
    found = int(labels.max()) + 1
    if found < 2:
        state = "called every row noise" if not found else "found a single cluster"
        raise DataError(
            f"HDBSCAN {state} among {len(sample)} rows with min_cluster_size {size}; "
            "lower cluster.hdbscan_min_cluster_size or use cluster.method: kmeans"
        )
    noise = int((labels == NOISE).sum())
    centres = centroids(sample, labels)
    if len(sample) < len(vectors):
        notices.append(
            f"HDBSCAN fitted on {len(sample)} rows; all assigned to the nearest centroid"
        )
        return assign(vectors, centres)[0]
    if noise:
        action = "dropped" if config.noise == "drop" else "assigned to the nearest centroid"
        notices.append(f"{noise} of {len(labels)} rows were HDBSCAN noise and {action}")
    if config.noise == "drop":
        return labels
    return np.where(labels == NOISE, assign(vectors, centres)[0], labels)


def _by_task(tasks: Sequence[str | None] | None) -> Labels:
    missing = sum(task is None or pd.isna(task) for task in tasks or [None])
    if tasks is None or missing:
        raise DataError(
            f"cluster.method: task needs a task label on every training row, {missing} lack one; "
            "name the column in data.columns or use kmeans"
        )
    return np.unique(np.asarray(tasks, dtype=object).astype(str), return_inverse=True)[1]


def _merge_small(vectors: Embeddings, labels: Labels, min_rows: int, notices: list[str]) -> Labels:
    """Merge the smallest cluster into its nearest until every cluster can be trained."""
    labels = labels.copy()
    while True:
        ids, counts = np.unique(labels[labels != NOISE], return_counts=True)
        if len(ids) < 2 or counts.min() >= min_rows:
            return np.where(labels == NOISE, NOISE, np.searchsorted(ids, labels))
        small = int(ids[counts.argmin()])
        compact = np.where(labels == NOISE, NOISE, np.searchsorted(ids, labels))
        centres = centroids(vectors, compact)
        similarity = centres @ centres[counts.argmin()]
        similarity[counts.argmin()] = -np.inf
        target = int(ids[similarity.argmax()])
        notices.append(
            f"a cluster of {counts.min()} rows (fewer than cluster.min_rows = {min_rows}) "
            "was merged into its nearest"
        )
        labels[labels == small] = target


def _by_size(labels: Labels) -> Labels:
    """Renumber clusters by falling size, so that names do not depend on the initialisation."""
    ids, counts = np.unique(labels[labels != NOISE], return_counts=True)
    order = ids[np.argsort(-counts, kind="stable")]
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.searchsorted(ids, order)] = np.arange(len(ids))
    return np.where(labels == NOISE, NOISE, rank[np.searchsorted(ids, labels)])
