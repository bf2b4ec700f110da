"""Clusters of rows that the base model treats alike, whatever their words; text may have a say."""

from typing import TYPE_CHECKING

import numpy as np

from tclora.cluster.clusterers.kmeans import kmeans
from tclora.cluster.registry import Groups, Rows, register
from tclora.cluster.vectors import Embeddings
from tclora.config import ClusterConfig

if TYPE_CHECKING:
    from tclora.cluster.features.request import FeatureRequest, Features
    from tclora.jobs.call import EventCallback


def _hidden_states(request: "FeatureRequest", on_event: "EventCallback") -> "Features":
    from tclora.cluster.features.hidden import hidden_states  # with torch and transformers

    return hidden_states(request, on_event)


def _gradients(request: "FeatureRequest", on_event: "EventCallback") -> "Features":
    from tclora.cluster.features.gradients import gradient_sketches

    return gradient_sketches(request, on_event)


def _probes(request: "FeatureRequest", on_event: "EventCallback") -> "Features":
    from tclora.cluster.features.probes import probe_coordinates

    return probe_coordinates(request, on_event)


@register("hidden-states", features=_hidden_states)
def hidden_states(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """k-means on the base model's hidden states where it predicts the response."""
    return _divide(rows, config, seed)


@register("gradients", features=_gradients)
def gradients(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """k-means on random projections of each row's gradient with respect to the LoRA's B."""
    return _divide(rows, config, seed)


@register("lora-parameters", features=_probes)
def lora_parameters(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """k-means on the updates of short probe adapters, one per task or shard of rows (MBC)."""
    return _divide(rows, config, seed)


def _divide(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    if rows.features is None:
        raise ValueError("rows must have features for a clusterer that looks at the model")
    mixed = mix(np.asarray(rows.features), np.asarray(rows.vectors), config.mix)
    return kmeans(Rows(mixed, rows.tasks), config, seed)


def mix(features: Embeddings, vectors: Embeddings, weight: float) -> Embeddings:
    """Return vectors whose cosines are those of both, `weight` of them from the text.

    Parameters
    ----------
    features, vectors : ndarray of float32, shapes (N, F) and (N, D)
        Unit-norm rows.
    weight : float
        Share of the text, 0–1.

    Returns
    -------
    ndarray of float32, shape (N, F + D)
        Of unit norm; (N, F) or (N, D) where one of them has all the weight.
    """
    if weight in {0, 1}:
        return vectors if weight else features
    return np.concatenate([(1 - weight) ** 0.5 * features, weight**0.5 * vectors], axis=1)
