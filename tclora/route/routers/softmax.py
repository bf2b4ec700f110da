"""Routing to a mixture by similarity."""

from dataclasses import dataclass
from typing import Self, Unpack

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Embeddings
from tclora.route.router import FitOptions, RouterState, routers
from tclora.route.routing import Routing
from tclora.route.text import TextClusters


@routers.register("softmax")
@dataclass(frozen=True)
class Softmax:
    """A softmax over the similarities to the centroids, at a calibrated temperature."""

    clusters: TextClusters

    @classmethod
    def fit(cls, vectors: Embeddings, labels: Labels, **options: Unpack[FitOptions]) -> Self:
        """Calibrate; see `Router.fit`."""
        return cls(TextClusters.fit(vectors, labels, **options))

    def route(self, vectors: Embeddings) -> Routing:
        """Route prompts; see `Router.route`."""
        weights = self.clusters.probabilities(vectors, self.clusters.top_k)
        return self.clusters.routing(vectors, weights)

    def save(self) -> RouterState:
        """Return plain values; see `Router.save`."""
        return self.clusters.save()

    @classmethod
    def load(cls, state: RouterState) -> Self:
        """Return what was saved; see `Router.load`."""
        return cls(TextClusters.load(state))
