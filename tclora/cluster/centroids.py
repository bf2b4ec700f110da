"""Centroids of clusters and the nearest of them.

Symbols: N rows, D embedding width, K clusters.
"""

import numpy as np
from numpy.typing import NDArray

from tclora.cluster.embed import Embeddings

Labels = NDArray[np.int64]
NOISE = -1  # label of rows that belong to no cluster


def centroids(vectors: Embeddings, labels: Labels) -> NDArray[np.float32]:
    """Return the unit-norm mean direction of every cluster, shape (K, D); noise does not count."""
    means = np.stack([vectors[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(unit, dtype=np.float32)


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
