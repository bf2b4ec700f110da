"""Gram matrices of a module's inputs, made ready for inversion.

Symbols: K clusters, d_in the width of the module's input, G_k (d_in, d_in) the mean of
x xᵀ over cluster k.
"""

import torch
from torch import Tensor

from tclora.merge.stack import ModuleStack

# Off-diagonal elements are multiplied by this, as RegMean's authors do (arXiv 2212.09849).
_OFF_DIAGONAL = 0.9
# Least diagonal element, relative to the mean one: inputs that were never active.
_FLOOR = 1e-6


def input_grams(stack: ModuleStack) -> Tensor:
    """Return positive definite Gram matrices, weighted by the adapters, shape (K, d_in, d_in).

    Raises
    ------
    ValueError
        If the module has no activation statistics.
    """
    if stack.inputs is None:
        raise ValueError(f"{stack.module}: activation statistics are missing; pass statistics=…")
    grams = stack.inputs()
    diagonal = grams.diagonal(dim1=1, dim2=2).clone()
    floor = _FLOOR * diagonal.mean().clamp_min(torch.finfo(grams.dtype).tiny)
    weights = stack.weights.to(grams)
    grams *= _OFF_DIAGONAL * weights[:, None, None]
    grams.diagonal(dim1=1, dim2=2).copy_(diagonal.clamp_min(floor) * weights[:, None])
    return grams
