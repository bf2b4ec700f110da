"""Routing to a mixture by distance to exemplars."""

from dataclasses import dataclass
from typing import Self, Unpack

import numpy as np

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Embeddings
from tclora.route.router import FitOptions, RouterState, routers
from tclora.route.routing import Routing
from tclora.route.text import TextClusters, strongest

_NEAR = 1e-3  # distances below count as this one


@routers.register("membership")
@dataclass(frozen=True)
class Membership:
    """Weights in inverse proportion to the distance to each cluster's nearest exemplar.

    For clusters of any shape: the distance-based soft clustering of HDBSCAN, whose exemplars are
    the points of highest density.
    """

    clusters: TextClusters

    @classmethod
    def fit(cls, vectors: Embeddings, labels: Labels, **options: Unpack[FitOptions]) -> Self:
        """Calibrate; see `Router.fit`."""
        return cls(TextClusters.fit(vectors, labels, **options))

    def route(self, vectors: Embeddings) -> Routing:
        """Route prompts; see `Router.route`."""
        similarity = self.clusters.exemplar_similarity(vectors)
        distance = np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), _NEAR**2))
        scores = strongest(1 / distance, self.clusters.top_k, 0.0)
        weights = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
        return self.clusters.routing(vectors, weights)

    def save(self) -> RouterState:
        """Return plain values; see `Router.save`."""
        return self.clusters.save()

    @classmethod
    def load(cls, state: RouterState) -> Self:
        """Return what was saved; see `Router.load`."""
        return cls(TextClusters.load(state))
