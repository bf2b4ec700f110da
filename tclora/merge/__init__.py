"""Merging LoRA adapters in factor space: a registry of methods and the engine that runs them."""

from tclora.merge import (  # noqa: F401  (registers the methods)
    activation,
    cp,
    dense,
    leastsquares,
    linear,
    spectral,
    subspace,
)
from tclora.merge.engine import Merge, merge
from tclora.merge.registry import MethodInfo, methods, register
from tclora.merge.statistics import ActivationStatistics, collect

__all__ = ["ActivationStatistics", "Merge", "MethodInfo", "collect", "merge", "methods", "register"]
