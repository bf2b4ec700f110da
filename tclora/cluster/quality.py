"""How good a division of rows is, and a map of it.

Symbols: N rows, D embedding width, K clusters.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.cluster.centroids import NOISE, Labels
from tclora.cluster.vectors import Vectors, by_blocks, sample

_SILHOUETTE_ROWS = 5_000
_MAP_ROWS = 50_000  # that the axes of the map are fitted on


def silhouette(vectors: Vectors, labels: Labels, seed: int = 0) -> float | None:
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


def map_2d(vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
    """Project embeddings on the first two principal components of (a sample of) them, (N, 2)."""
    from sklearn.decomposition import PCA

    if len(vectors) < 3:
        return np.zeros((len(vectors), 2), dtype=np.float32)
    pca = PCA(2, random_state=seed).fit(sample(vectors, _MAP_ROWS, seed))
    return by_blocks(pca.transform, vectors).astype(np.float32)
