"""Activation statistics: what the modules of the base model read on the rows of each cluster."""

from tclora.activations.collect import ActivationStatistics, collect
from tclora.activations.metric import InputMetric, InputMetrics

__all__ = ["ActivationStatistics", "InputMetric", "InputMetrics", "collect"]
