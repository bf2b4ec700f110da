"""Routing of every token by itself."""

from dataclasses import dataclass
from typing import Self, Unpack

import numpy as np

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Embeddings
from tclora.route.router import FitOptions, RouterState, routers
from tclora.route.routing import Routing, TokenRule
from tclora.route.text import TextClusters


@routers.register("per-token")
@dataclass(frozen=True)
class PerToken:
    """Every token in every module chooses its clusters itself, as Arrow routes, in factor space.

    The text decides only whether a prompt is known; clusters weigh the same for it.
    """

    clusters: TextClusters

    @classmethod
    def fit(cls, vectors: Embeddings, labels: Labels, **options: Unpack[FitOptions]) -> Self:
        """Calibrate; see `Router.fit`."""
        return cls(TextClusters.fit(vectors, labels, **options))

    def route(self, vectors: Embeddings) -> Routing:
        """Route prompts; see `Router.route`."""
        shape = (len(vectors), self.clusters.k)
        weights = np.full(shape, 1 / self.clusters.k, dtype=np.float32)
        return self.clusters.routing(vectors, weights, TokenRule(top_k=self.clusters.top_k))

    def save(self) -> RouterState:
        """Return plain values; see `Router.save`."""
        return self.clusters.save()

    @classmethod
    def load(cls, state: RouterState) -> Self:
        """Return what was saved; see `Router.load`."""
        return cls(TextClusters.load(state))
