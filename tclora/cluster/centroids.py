"""Centroids of clusters and the nearest of them.

Symbols: N rows, D embedding width, K clusters.
"""

import numpy as np
from numpy.typing import NDArray

from tclora.cluster.vectors import Vectors, row_blocks

Labels = NDArray[np.int64]
NOISE = -1  # label of rows that belong to no cluster


def centroids(vectors: Vectors, labels: Labels) -> NDArray[np.float32]:
    """Return the unit-norm mean direction of every cluster, shape (K, D); noise does not count."""
    sums = np.zeros((labels.max() + 1, vectors.shape[1]))
    for rows in row_blocks(len(vectors)):
        block, own = vectors[rows], labels[rows]
        for k in np.unique(own[own != NOISE]):
            sums[k] += block[own == k].sum(axis=0, dtype=np.float64)
    unit = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(unit, dtype=np.float32)


def assign(vectors: Vectors, centres: NDArray[np.float32]) -> tuple[Labels, NDArray[np.float32]]:
    """Return each row's nearest centroid and its cosine similarity to it.

    Parameters
    ----------
    vectors : array or VectorFile, shape (N, D)
        Unit-norm embeddings.
    centres : ndarray, shape (K, D)
        Unit-norm centroids.
    """
    nearest = np.empty(len(vectors), dtype=np.int64)
    highest = np.empty(len(vectors), dtype=np.float32)
    for rows in row_blocks(len(vectors)):
        similarity = vectors[rows] @ centres.T  # (rows, K)
        nearest[rows] = similarity.argmax(axis=1)
        highest[rows] = similarity.max(axis=1)
    return nearest, highest
