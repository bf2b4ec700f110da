"""WUDI: descent on the interference of the merged update with what each adapter reads.

Symbols: K adapters, d_out × d_in a module, m × n the core that holds all updates.
"""

import math

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's defaults, as published


@register(
    "wudi",
    summary="the sum of the updates, moved by Adam to disturb less what each adapter reads",
    paper="Cheng et al. 2025, Whoever Started the Interference Should End It, arXiv 2503.08099",
)
def wudi(stack: ModuleStack, *, steps: int = 300, step_size: float = 1e-5) -> LoraFactors:
    """Return Σ_k Δ_k after `steps` of Adam on L(Δ) = Σ_k ‖(Δ − Δ_k) Δ_kᵀ‖² / ‖Δ_k‖².

    Notes
    -----
    The gradient lies in the span of the updates, and so does this iteration, which runs on the
    core. The published one divides each of the d_out d_in elements by its own second moment and
    leaves the span; here all share one, the mean of theirs, so that the result depends on no basis.
    Where adapters are trained ones both end at about the same norm and loss. The minimiser itself
    is no substitute: it is ill-conditioned, and several times as large.
    """
    if steps < 0 or not step_size > 0:
        raise ValueError(
            f"steps must be at least 0 and step_size above 0, got {steps!r} and {step_size!r}"
        )
    core = stack.core
    cores = core.core  # (K, m, n)
    norms = cores.square().sum((1, 2))
    grams = cores.mT @ cores / torch.where(norms > 0, norms, 1)[:, None, None]
    merged = _adam(
        cores.sum(0),
        2 * grams.sum(0),
        2 * (cores @ grams).sum(0),
        math.prod(stack.factors[0].shape),
        steps=steps,
        step_size=step_size,
    )
    return LoraFactors(core.left @ merged, core.right.mT)


def _adam(
    x: Tensor, metric: Tensor, target: Tensor, elements: int, *, steps: int, step_size: float
) -> Tensor:
    """Descend along x metric − target, both moments those of a matrix of so many elements."""
    first, second = torch.zeros_like(x), x.new_zeros(())
    decay, slow = _BETAS
    for step in range(1, steps + 1):
        gradient = x @ metric - target
        first = decay * first + (1 - decay) * gradient
        second = slow * second + (1 - slow) * gradient.square().sum() / elements
        spread = (second / (1 - slow**step)).sqrt() + _EPSILON
        x = x - step_size / (1 - decay**step) / spread * first
    return x
