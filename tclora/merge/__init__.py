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
from tclora.merge.calibrate import Calibration, calibrate_components, calibrate_loadings
from tclora.merge.engine import Merge, merge
from tclora.merge.registry import MethodInfo, methods, register
from tclora.merge.scales import ScaleSearch, is_scaled, tune_scale
from tclora.merge.statistics import ActivationStatistics, collect

__all__ = [
    "ActivationStatistics",
    "Calibration",
    "Merge",
    "MethodInfo",
    "ScaleSearch",
    "calibrate_components",
    "calibrate_loadings",
    "collect",
    "is_scaled",
    "merge",
    "methods",
    "register",
    "tune_scale",
]
