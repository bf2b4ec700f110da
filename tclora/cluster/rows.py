"""Dividing examples among adapters by a registered clusterer.

Whatever the method, small clusters are merged, clusters are numbered by falling size, and each is
represented by its centroid, which the router uses.

Symbols: N rows, D embedding width, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tclora.cluster.centroids import NOISE, Labels, assign, centroids
from tclora.cluster.quality import silhouette
from tclora.cluster.registry import HeldOut, Rows, clusterers, to_nearest
from tclora.cluster.vectors import Vectors
from tclora.config import ClusterConfig


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
    held_out : HeldOut
        The clusterer's rule for held-out rows; see `assign`.
    """

    labels: Labels
    centroids: NDArray[np.float32]
    silhouette: float | None
    notices: tuple[str, ...]
    held_out: HeldOut = to_nearest

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    def assign(self, vectors: Vectors, tasks: Sequence[str | None] | None = None) -> Labels:
        """Give held-out rows the cluster whose adapter answers for them.

        Parameters
        ----------
        vectors : ndarray of float32, shape (n, D)
            Their unit-norm embeddings.
        tasks : sequence of n str or None, optional
            Their task labels.
        """
        rows = Rows(vectors, _labels(tasks, len(vectors)))
        return self.held_out(rows, assign(vectors, self.centroids)[0], self.labels)


def cluster_rows(
    vectors: Vectors,
    config: ClusterConfig,
    *,
    tasks: Sequence[str | None] | None = None,
    features: Vectors | None = None,
    seed: int = 0,
) -> Clustering:
    """Cluster the training rows.

    Parameters
    ----------
    vectors : array or VectorFile of float32, shape (N, D)
        Unit-norm embeddings.
    config : ClusterConfig
        Registered name of the clusterer, and settings.
    tasks : sequence of str or None, optional
        Labels of the rows, for clusterers that use them.
    features : array or VectorFile of float32, shape (N, F), optional
        What the base model says of the rows, for clusterers that use it.
    seed : int
        Seed of initial centroids, samples and random groups.

    Returns
    -------
    Clustering

    Raises
    ------
    DataError
        If the rows do not suffice; see the clusterers.
    ValueError
        If no clusterer has the name of ``config.method``.
    """
    rows = Rows(vectors, _labels(tasks, len(vectors)), features)
    groups = clusterers[config.method].function(rows, config, seed)
    notices = list(groups.notices)
    labels = _by_size(_merge_small(vectors, groups.labels, config.min_rows, notices))
    return Clustering(
        labels,
        centroids(vectors, labels),
        silhouette(vectors, labels, seed),
        tuple(notices),
        groups.held_out,
    )


def _labels(tasks: Sequence[str | None] | None, n: int) -> Sequence[str | None]:
    return [None] * n if tasks is None else tasks


def _merge_small(vectors: Vectors, labels: Labels, min_rows: int, notices: list[str]) -> Labels:
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
