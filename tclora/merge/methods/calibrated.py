"""Merges that scale shared directions down, before merging (Pico) or after it (SVC).

Symbols: K adapters, d_out × d_in a module, m × n the core that holds all updates, R a rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.methods.dense import ties
from tclora.merge.methods.spans import balanced, significant
from tclora.merge.methods.spectral import tsv_m
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.compress import orthonormal_basis
from tclora.tensor.lowrank import product_energy

Gauge = Literal["published", "balanced"]
# Responses below this share of the largest are what storage in single precision leaves of none.
_ROUNDING = 32 * torch.finfo(torch.float32).eps


@register(
    "svc",
    summary="average of the updates, singular values raised where few adapters share a direction",
    paper="Li et al. 2026, When Shared Knowledge Hurts (SVC), arXiv 2602.05536",
)
def svc(stack: ModuleStack, *, alpha: float | None = None, scale: float = 1.0) -> LoraFactors:
    """Return λ U diag(S_ρ / mean_k max(α, s_ρk)) Vᵀ, with U S Vᵀ the average of the updates.

    s_ρk = ⟨u_ρᵀ Δ, u_ρᵀ Δ_k⟩ / ‖u_ρᵀ Δ_k‖² says how much of adapter k's response along u_ρ is in
    the average, 0 where adapter k has no response; α is 1 / K unless given, as the authors set it
    for averages.
    """
    alpha = 1 / len(stack.factors) if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha!r}")
    core, cores = stack.core, stack.core.core
    U, S, Vh = torch.linalg.svd(cores.mean(0), full_matrices=False)
    kept = significant(S)
    U, S, Vh = U[:, kept], S[kept], Vh[kept]
    responses = U.mT @ cores  # (K, q, n)
    energy = responses.square().sum(2)  # (K, q)
    least = _ROUNDING**2 * energy.max() if energy.numel() else 0
    share = torch.where(energy > least, S * (responses * Vh).sum(2) / energy, 0)
    raised = scale * S / share.clamp_min(alpha).mean(0)
    return LoraFactors((core.left @ U) * raised, Vh @ core.right.mT)


@register(
    "pico",
    summary="shared directions of all B scaled down, then a merge, rescaled to one update's norm",
    paper="Tang, Yang 2026, Crowded in B-Space (Pico), arXiv 2604.16826",
    exact=False,
)
def pico(
    stack: ModuleStack, *, rule: str = "sum", gauge: Gauge = "published", scale: float = 1.0
) -> LoraFactors | Tensor:
    """Return λ γ times the merge of U diag(1 / (1 + (K − 1) c)) Uᵀ Δ_k.

    U and c are the left singular vectors of [B_1 … B_K] and their shares of the energy; γ gives the
    merge the mean norm of the updates. `rule` is "sum", "ties" or "tsv-m". The published form
    depends on how each update was split into B and A; `gauge` "balanced" splits them evenly.
    """
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {sorted(_RULES)}, got {rule!r}")
    factors = _in_gauge(stack, gauge)
    calm = damped(factors, stack.weights.new_full(stack.weights.shape, 1 / len(factors)))
    merged = _RULES[rule](replace(stack, factors=calm))
    norms = [product_energy(*f) ** 0.5 for f in factors]
    return _at_norm(merged, scale * sum(norms) / len(norms))


def damped(
    factors: Sequence[LoraFactors], weights: Tensor, strength: float = 1.0
) -> list[LoraFactors]:
    """Scale the output directions down that many updates share.

    Parameters
    ----------
    factors : sequence of K LoraFactors
        The updates; how they are split into B and A matters.
    weights : Tensor, shape (K,)
        How much each counts, with sum 1.
    strength : float
        Exponent of the damping; 1 is Pico's, 0 leaves everything as it is.

    Returns
    -------
    list of K LoraFactors
        U diag(1 / (1 + (K − 1) c))^strength Uᵀ Δ_k, with U and c the left singular vectors of
        [√w_1 B_1 … √w_K B_K] and their shares of the energy; K is 1 / Σ w².
    """
    weighted = [f.B * weight.sqrt() for f, weight in zip(factors, weights, strict=True)]
    left, coordinates = orthonormal_basis(torch.cat(weighted, dim=1))
    U, S, _ = torch.linalg.svd(coordinates, full_matrices=False)
    energy = S.square().sum()
    shares = S.square() / torch.where(energy > 0, energy, 1)
    damping = (1 + (1 / weights.square().sum() - 1) * shares) ** -strength
    basis = left @ U
    # Directions outside of the basis, of weights of zero, are not damped.
    return [LoraFactors(f.B + basis * (damping - 1) @ (basis.mT @ f.B), f.A) for f in factors]


_RULES: dict[str, Callable[[ModuleStack], LoraFactors | Tensor]] = {
    "sum": lambda stack: stack.concatenated(stack.weights.new_ones(len(stack.factors))),
    "ties": ties,
    "tsv-m": tsv_m,
}


def _in_gauge(stack: ModuleStack, gauge: str) -> list[LoraFactors]:
    if gauge not in {"published", "balanced"}:
        raise ValueError(f"gauge must be 'published' or 'balanced', got {gauge!r}")
    return list(stack.factors) if gauge == "published" else balanced(stack)


def _at_norm(update: LoraFactors | Tensor, norm: float) -> LoraFactors | Tensor:
    """Scale an update to a norm; one of zero stays as it is."""
    if isinstance(update, Tensor):
        return update * (norm / float(update.norm()) if update.any() else 1.0)
    own = product_energy(*update) ** 0.5
    return LoraFactors(update.B * (norm / own if own else 1.0), update.A)
