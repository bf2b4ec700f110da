"""Clusters as text routers see them: centroids, thresholds, temperature and exemplars.

The registered text routers differ in how they weigh clusters; what they weigh them by is here.

Symbols: N prompts, D embedding width, K clusters, s (N, K) cosine similarities to the centroids,
κ (N,) belonging.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from tclora.cluster.centroids import NOISE, Labels, assign, centroids
from tclora.cluster.vectors import Embeddings
from tclora.errors import LibraryError
from tclora.route.nearness import Abstention, NearnessScale, belonging, held_out_similarity
from tclora.route.router import RouterState
from tclora.route.routing import Array, Routing, TokenRule

_ARRAYS = ("centroids", "thresholds", "exemplars")
_TEMPERATURES = (1e-3, 1.0)  # bounds of the calibration
_EXEMPLARS, _NEIGHBOURS, _DENSITY_ROWS = 16, 5, 2000
_ROUNDING = 1e-4  # an embedding differs by less between batches and machines


@dataclass(frozen=True)
class TextClusters:
    """What text routers know of the clusters.

    Attributes
    ----------
    centroids : ndarray of float32, shape (K, D)
        Unit-norm centroids.
    thresholds : ndarray of float32, shape (K,)
        Least cosine similarity to a centroid at which its cluster knows a prompt: belonging is one
        half there.
    temperature : float
        Temperature of the softmax over cosine similarities.
    exemplars : ndarray of float32, shape (K, E, D)
        The rows in the densest part of each cluster; repeated where a cluster has fewer than E.
    top_k : int or None
        A mixture is of at most this many clusters; of all if None.
    widths : ndarray of float32, shape (K,), optional
        Cosine similarity over which belonging falls; a step by default, as in former libraries.
    """

    centroids: Array
    thresholds: Array
    temperature: float
    exemplars: Array
    top_k: int | None = None
    widths: Array | None = None

    @classmethod
    def fit(
        cls,
        vectors: Embeddings,
        labels: Labels,
        *,
        top_k: int | None = None,
        coverage: float = 0.99,
        abstention: Abstention | None = None,
        seed: int = 0,
    ) -> Self:
        """Calibrate on the rows that were clustered; see `Router.fit`.

        Notes
        -----
        Thresholds and temperature come from similarities to centroids that were computed without
        the row itself (cross-fitting), so that they hold for new prompts. A threshold stands where
        the abstention rule puts it, or lower if less than `coverage` of the rows lay above.
        """
        kept = labels != NOISE
        vectors, labels = vectors[kept], labels[kept]
        centres = centroids(vectors, labels)
        similarity = held_out_similarity(vectors, labels, centres, seed)
        rule = abstention or Abstention()
        scale = NearnessScale.of(similarity, labels)
        lowest = [
            np.quantile(similarity[labels == k, k], 1 - coverage, method="lower") - _ROUNDING
            for k in range(len(centres))
        ]
        return cls(
            centroids=centres,
            thresholds=np.minimum(scale.similarity(rule.at), lowest).astype(np.float32),
            widths=(rule.width * scale.spread).astype(np.float32),
            temperature=calibrate_temperature(similarity, labels),
            exemplars=np.stack([_densest(vectors[labels == k]) for k in range(len(centres))]),
            top_k=top_k,
        )

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    def nearest(self, vectors: Embeddings) -> Labels:
        """Return each prompt's nearest centroid, shape (N,).

        Raises
        ------
        ValueError
            If the width is not the centroids'.
        """
        return assign(self._checked(vectors), self.centroids)[0]

    def probabilities(self, vectors: Embeddings, top_k: int | None = None) -> Array:
        """Return softmax(s / T) of the similarities s, over the `top_k` nearest or all clusters.

        Raises
        ------
        ValueError
            If the width is not the centroids'.
        """
        logits = (self._checked(vectors) @ self.centroids.T).astype(np.float64) / self.temperature
        return np.asarray(softmax(strongest(logits, top_k, -np.inf), axis=1), dtype=np.float32)

    def exemplar_similarity(self, vectors: Embeddings) -> Array:
        """Return the similarity to each cluster's nearest exemplar, shape (N, K).

        Raises
        ------
        ValueError
            If the width is not the exemplars'.
        """
        checked = self._checked(vectors)
        return np.asarray(np.einsum("nd,ked->nke", checked, self.exemplars).max(axis=2))

    def routing(
        self, vectors: Embeddings, weights: Array, by_token: TokenRule | None = None
    ) -> Routing:
        """Return a routing of these weights with what is known of the prompts."""
        nearest, highest = assign(self._checked(vectors), self.centroids)
        above = highest - self.thresholds[nearest]
        shares = belonging(above, None if self.widths is None else self.widths[nearest])
        return Routing(weights, above >= 0, highest, self.probabilities(vectors), by_token, shares)

    def save(self) -> RouterState:
        """Return these clusters as plain values."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.widths is not None:
            arrays["widths"] = self.widths
        return RouterState(arrays, {"temperature": self.temperature, "top_k": self.top_k})

    @classmethod
    def load(cls, state: RouterState) -> Self:
        """Return the clusters of stored values.

        Raises
        ------
        LibraryError
            If some are missing.
        """
        lacking = [name for name in _ARRAYS if name not in state.arrays]
        lacking += [name for name in ("temperature", "top_k") if name not in state.settings]
        if lacking:
            raise LibraryError(
                f"a text router must have stored {', '.join(lacking)}, which this library's router "
                "does not; choose another router, or run the pipeline with route.router"
            )
        return cls(
            temperature=state.settings["temperature"],
            top_k=state.settings["top_k"],
            widths=state.arrays.get("widths"),
            **{name: state.arrays[name] for name in _ARRAYS},
        )

    def _checked(self, vectors: Embeddings) -> Embeddings:
        if vectors.ndim != 2 or vectors.shape[1] != self.centroids.shape[1]:
            raise ValueError(
                f"vectors must have shape (N, {self.centroids.shape[1]}), got {vectors.shape}"
            )
        return vectors


def strongest(scores: NDArray[np.float64], top_k: int | None, absent: float) -> NDArray[np.float64]:
    """Keep the `top_k` highest scores of each row, replace the others."""
    if top_k is None or top_k >= scores.shape[1]:
        return scores
    below = np.argsort(-scores, axis=1, kind="stable")[:, top_k:]
    kept = scores.copy()
    np.put_along_axis(kept, below, absent, axis=1)
    return kept


def _densest(vectors: Embeddings) -> Array:
    """Return the rows nearest to their neighbours, shape (E, D), the densest ones again if few."""
    if len(vectors) > _DENSITY_ROWS:  # all pairs are compared
        rows = np.random.default_rng(0).choice(len(vectors), size=_DENSITY_ROWS, replace=False)
        vectors = vectors[rows]
    similarity = np.sort(vectors @ vectors.T, axis=1)[:, ::-1]
    core = similarity[:, min(_NEIGHBOURS, len(vectors) - 1)]  # to the k-th neighbour
    order = np.argsort(-core, kind="stable")
    return np.asarray(vectors[np.resize(order, _EXEMPLARS)], dtype=np.float32)


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
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        logits = similarity.astype(np.float64) / np.exp(log_temperature)
        return -float(log_softmax(logits, axis=1)[rows, labels].mean())

    bounds = tuple(float(np.log(bound)) for bound in _TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
