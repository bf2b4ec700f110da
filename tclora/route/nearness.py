"""Nearness: how near a prompt is to a cluster, on a scale that all clusters share.

0 is as far as the other clusters' rows mostly are, 1 as near as the cluster's own mostly are, as
measured on rows that the centroid has not seen.

Symbols: N prompts, D embedding width, K clusters.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Embeddings

Array = NDArray[np.float32]
_FOLDS = 5
_LEAST_SPREAD = 1e-3  # between near and far, where clusters lie on each other


@dataclass(frozen=True)
class Abstention:
    """How belonging falls with the distance of a prompt, for all clusters alike.

    Attributes
    ----------
    at : float
        Nearness at which belonging is one half; farther prompts count as unknown.
    width : float
        Nearness over which it falls, the scale of a logistic curve; 0 is a step.
    """

    at: float = 0.25
    width: float = 0.05


@dataclass(frozen=True)
class NearnessScale:
    """The ends of every cluster's scale.

    Attributes
    ----------
    far : ndarray, shape (K,)
        Cosine similarity to the centroid that is nearness 0.
    spread : ndarray, shape (K,)
        How much higher the similarity is at nearness 1.
    """

    far: Array
    spread: Array

    @classmethod
    def of(cls, similarity: Array, labels: Labels) -> Self:
        """Measure the scale on similarities (N, K) of rows to centroids that did not see them."""
        K = similarity.shape[1]
        near = np.array([np.median(similarity[labels == k, k]) for k in range(K)])
        # A cluster alone has none to be told from; unrelated texts are near to a right angle.
        far = np.array([np.median(similarity[labels != k, k]) if K > 1 else 0.0 for k in range(K)])
        return cls(far, np.maximum(near - far, _LEAST_SPREAD))

    def similarity(self, nearness: float) -> Array:
        """Return the similarity of every cluster at a nearness, shape (K,)."""
        return np.asarray(self.far + nearness * self.spread)

    def nearness(self, similarity: Array) -> Array:
        """Return the nearness of similarities to the clusters, shape (N, K)."""
        return np.asarray((similarity - self.far) / self.spread)


def held_out_similarity(vectors: Embeddings, labels: Labels, centres: Array, seed: int) -> Array:
    """Return similarities (N, K), each row's to centroids of the other folds' rows.

    Parameters
    ----------
    vectors : ndarray of float32, shape (N, D)
        Unit-norm embeddings.
    labels : ndarray of int64, shape (N,)
        Clusters, 0 … K-1.
    centres : ndarray of float32, shape (K, D)
        Centroids of all rows, for clusters of a single one.
    seed : int
        Seed of the folds.
    """
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=np.int64)
    for k in range(len(centres)):  # every fold gets its share of every cluster
        members = np.flatnonzero(labels == k)
        fold[rng.permutation(members)] = np.arange(len(members)) % _FOLDS
    similarity = np.empty((len(labels), len(centres)), dtype=np.float32)
    for part in range(_FOLDS):
        rest = fold != part
        fitted = centres.copy()
        present = np.unique(labels[rest])  # a cluster of one row has no other
        for k in present:
            fitted[k] = _centroid(vectors[rest & (labels == k)])
        similarity[~rest] = vectors[~rest] @ fitted.T
    return similarity


def _centroid(vectors: Embeddings) -> Array:
    mean = vectors.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean), dtype=np.float32)


def belonging(above: Array, widths: Array | None) -> Array:
    """Return κ of prompts so far above their clusters' thresholds, shape (N,)."""
    if widths is None:
        return (above >= 0).astype(np.float32)
    slope = np.maximum(widths, np.finfo(np.float32).tiny)
    return np.asarray(expit(above.astype(np.float64) / slope), dtype=np.float32)
