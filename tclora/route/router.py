"""Text routing: from the embedding of a prompt to the weights of the clusters.

Symbols: N prompts, D embedding width, K clusters, s (N, K) cosine similarities to the centroids.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tclora.cluster.embed import Embeddings
from tclora.cluster.rows import NOISE, Labels, assign, centroids

Mode = Literal["nearest", "softmax", "membership"]
Array = NDArray[np.float32]
_TEMPERATURES = (1e-3, 1.0)  # bounds of the calibration
_FOLDS = 5
_EXEMPLARS, _NEIGHBOURS, _DENSITY_ROWS = 16, 5, 2000
_NEAR = 1e-3  # distances below count as this one
_ROUNDING = 1e-4  # an embedding differs by less between batches and machines


@dataclass(frozen=True)
class Routing:
    """Where prompts go.

    Attributes
    ----------
    weights : ndarray of float32, shape (N, K)
        Not negative, rows of sum 1.
    known : ndarray of bool, shape (N,)
        Whether the prompt is near enough to its nearest cluster; others get the static merge.
    similarity : ndarray of float32, shape (N,)
        Cosine similarity to the nearest centroid.
    """

    weights: Array
    known: NDArray[np.bool_]
    similarity: Array

    @property
    def coverage(self) -> float:
        """Share of the prompts that are routed (0–1)."""
        return float(self.known.mean())


@dataclass(frozen=True)
class Router:
    """Weighs clusters by the similarity of a prompt to their centroids.

    Attributes
    ----------
    centroids : ndarray of float32, shape (K, D)
        Unit-norm centroids.
    thresholds : ndarray of float32, shape (K,)
        Least cosine similarity to a centroid at which its cluster knows a prompt.
    temperature : float
        Temperature of the softmax over cosine similarities.
    exemplars : ndarray of float32, shape (K, E, D)
        The rows in the densest part of each cluster; repeated where a cluster has fewer than E.
    mode : {"nearest", "softmax", "membership"}
        The nearest cluster alone; a softmax over similarities to centroids; or, for clusters of any
        shape, weights in inverse proportion to the distance to each cluster's nearest exemplar.
    top_k : int or None
        A mixture of at most this many clusters; all if None.

    Notes
    -----
    "membership" is the distance-based soft clustering of HDBSCAN, whose exemplars are the points of
    highest density.
    """

    centroids: Array
    thresholds: Array
    temperature: float
    exemplars: Array
    mode: Mode = "nearest"
    top_k: int | None = None

    def route(self, vectors: Embeddings) -> Routing:
        """Route prompts by their embeddings.

        Parameters
        ----------
        vectors : ndarray of float32, shape (N, D)
            Unit-norm embeddings by the model that made the centroids.

        Raises
        ------
        ValueError
            If the width is not the centroids'.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.centroids.shape[1]:
            raise ValueError(
                f"vectors must have shape (N, {self.centroids.shape[1]}), got {vectors.shape}"
            )
        nearest, highest = assign(vectors, self.centroids)
        if self.mode == "nearest":
            weights = np.eye(len(self.centroids), dtype=np.float32)[nearest]
        elif self.mode == "softmax":
            weights = self.probabilities(vectors, self.top_k)
        else:
            weights = self._memberships(vectors)
        return Routing(weights, highest >= self.thresholds[nearest], highest)

    def probabilities(self, vectors: Embeddings, top_k: int | None = None) -> Array:
        """Return softmax(s / T) of the similarities s, over the `top_k` nearest or all clusters."""
        from scipy.special import softmax

        logits = (vectors @ self.centroids.T).astype(np.float64) / self.temperature
        return np.asarray(softmax(_strongest(logits, top_k, -np.inf), axis=1), dtype=np.float32)

    def _memberships(self, vectors: Embeddings) -> Array:
        similarity = np.einsum("nd,ked->nke", vectors, self.exemplars).max(axis=2)  # (N, K)
        distance = np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), _NEAR**2))
        weights = _strongest(1 / distance, self.top_k, 0.0)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _strongest(
    scores: NDArray[np.float64], top_k: int | None, absent: float
) -> NDArray[np.float64]:
    """Keep the `top_k` highest scores of each row, replace the others."""
    if top_k is None or top_k >= scores.shape[1]:
        return scores
    below = np.argsort(-scores, axis=1, kind="stable")[:, top_k:]
    kept = scores.copy()
    np.put_along_axis(kept, below, absent, axis=1)
    return kept


def fit_router(
    vectors: Embeddings,
    labels: Labels,
    *,
    mode: Mode = "nearest",
    top_k: int | None = None,
    coverage: float = 0.99,
    seed: int = 0,
) -> Router:
    """Calibrate a router on the rows that were clustered.

    Parameters
    ----------
    vectors : ndarray of float32, shape (N, D)
        Unit-norm embeddings of the training prompts.
    labels : ndarray of int64, shape (N,)
        Their clusters, 0 … K-1; -1 for rows that belong to none.
    mode, top_k
        See `Router`.
    coverage : float
        Share of each cluster's rows that its threshold lets through at least (0–1).
    seed : int
        Seed of the folds.

    Returns
    -------
    Router

    Notes
    -----
    Thresholds and temperature come from similarities to centroids that were computed without the
    row itself (cross-fitting), so that they hold for new prompts.
    """
    kept = labels != NOISE
    vectors, labels = vectors[kept], labels[kept]
    centres = centroids(vectors, labels)
    similarity = _held_out_similarity(vectors, labels, centres, seed)
    thresholds = [
        _threshold(similarity[labels == k, k], similarity[labels != k, k], coverage)
        for k in range(len(centres))
    ]
    return Router(
        centroids=centres,
        thresholds=np.array(thresholds, dtype=np.float32),
        temperature=calibrate_temperature(similarity, labels),
        exemplars=np.stack([_densest(vectors[labels == k]) for k in range(len(centres))]),
        mode=mode,
        top_k=top_k,
    )


def _threshold(own: Array, others: Array, coverage: float) -> float:
    """Return the least similarity at which a cluster knows a prompt.

    It lies halfway between the cluster's own farthest rows and the nearest rows of other clusters,
    or at its own farthest ones where those overlap; a share of 1 - coverage counts as outliers.
    """
    lowest = float(np.quantile(own, 1 - coverage, method="lower"))
    if not len(others):
        return lowest - _ROUNDING
    nearest = float(np.quantile(others, coverage, method="higher"))
    return min(lowest, (lowest + nearest) / 2) - _ROUNDING


def _densest(vectors: Embeddings) -> Array:
    """Return the rows nearest to their neighbours, shape (E, D), the densest ones again if few."""
    if len(vectors) > _DENSITY_ROWS:  # all pairs are compared
        rows = np.random.default_rng(0).choice(len(vectors), size=_DENSITY_ROWS, replace=False)
        vectors = vectors[rows]
    similarity = np.sort(vectors @ vectors.T, axis=1)[:, ::-1]
    core = similarity[:, min(_NEIGHBOURS, len(vectors) - 1)]  # to the k-th neighbour
    order = np.argsort(-core, kind="stable")
    return np.asarray(vectors[np.resize(order, _EXEMPLARS)], dtype=np.float32)


def _held_out_similarity(vectors: Embeddings, labels: Labels, centres: Array, seed: int) -> Array:
    """Return (N, K) similarities, each row's to centroids of the other folds' rows."""
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


def calibrate_temperature(similarity: Array, labels: Labels) -> float:
    """Return the temperature at which softmax(s / T) gives the labels the highest likelihood.

    Parameters
    ----------
    similarity : ndarray, shape (N, K)
        Cosine similarities.
    labels : ndarray of int64, shape (N,)
        True clusters, 0 … K-1.

    Notes
    -----
    The likelihood is convex in 1/T; where every row is nearest to its own centroid by a margin, T
    ends at the lower bound.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        logits = similarity.astype(np.float64) / np.exp(log_temperature)
        return -float(log_softmax(logits, axis=1)[rows, labels].mean())

    bounds = tuple(float(np.log(bound)) for bound in _TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
