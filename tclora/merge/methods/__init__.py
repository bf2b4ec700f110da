"""The merge methods, one decorated function each; importing this package registers them."""

from tclora.merge.methods import (
    activation,
    calibrated,
    cp,
    dense,
    drift,
    interference,
    leastsquares,
    linear,
    spectral,
    subspace,
)

__all__ = [
    "activation",
    "calibrated",
    "cp",
    "dense",
    "drift",
    "interference",
    "leastsquares",
    "linear",
    "spectral",
    "subspace",
]
