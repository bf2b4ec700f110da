"""Merges without data, in the metric of the adapters' own drift from their common start.

Gradient descent moves a LoRA's input factor only along inputs that it was trained on: every step
adds Bᵀ g xᵀ to A_k. Where all adapters start from one A₀, what sets A_k apart from their mean is
such a sum, and its Gram matrix stands in for that of cluster k's inputs, which RegMean and
`tc-lora-activation` take from sample rows. Adapters that share no start are taken to have inputs
of equal variance in every direction, which makes of RegMean the plain mean.

What a cluster's inputs do not share with the others' is kept; of the output directions that most
updates write to, each would bring its own there all the same. So these are scaled down before, by
Pico's rule for crowded B, and every module gets back the norm that its updates have lost.

Metric and damping depend on how an update was split into B and A: adapters are read as trained.

Symbols: K adapters, d_out × d_in a module, A_k (r, d_in), F_k = A_k − mean_j A_j,
q = min(d_in, Σ r_k).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tclora.activations.metric import InputMetric
from tclora.adapter import LoraFactors
from tclora.merge.methods.activation import tc_lora_activation
from tclora.merge.methods.calibrated import damped
from tclora.merge.methods.cp import PAPER
from tclora.merge.methods.leastsquares import regmean, truncate_in_metric
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.merge.truncate import Truncated
from tclora.tensor.compress import orthonormal_basis
from tclora.tensor.lowrank import product_energy

# Variance of the inputs that is equal in all directions, relative to what the drift shows.
_ISOTROPIC = 0.01
# A drift of this share of its factor's energy counts by half.
_LEAST = 1e-4
# Adapters share a start where they are that much closer to each other than independent ones are.
_SHARED = 0.75


def drifts(As: Sequence[Tensor]) -> list[Tensor]:
    """Return what each input factor has moved from the common start, shapes (r_k, d_in).

    Parameters
    ----------
    As : sequence of K Tensor, shape (r_k, d_in)
        Input factors as trained.

    Returns
    -------
    list of Tensor
        Zero where the adapters share no start: their ranks differ, or they are as far from each
        other as independent ones.
    """
    kept = [A for A in As if A.shape[0]]  # an adapter without the module has rank zero
    still = [torch.zeros_like(A) for A in As]
    if len(kept) < 2 or len({A.shape for A in kept}) > 1:
        return still
    stack = torch.stack(kept)
    moved = stack - stack.mean(0)
    independent = (1 - 1 / len(kept)) * stack.square().sum()
    if moved.square().sum() > _SHARED * independent:
        return still
    found = iter(moved)
    return [next(found) if A.shape[0] else zero for A, zero in zip(As, still, strict=True)]


def _in_drift_metric(stack: ModuleStack) -> tuple[ModuleStack, Tensor]:
    """Return the stack with the drift's metric as its inputs', and the basis it is written in.

    All updates and the metric keep the span of the input factors, (d_in, q), so the problem is
    solved in an orthonormal basis of it: O(d_in q²) instead of O(d_in³).
    """
    basis, _ = orthonormal_basis(torch.cat(stack.As).mT)
    d_in = basis.shape[0]
    pairs = zip(stack.As, drifts(stack.As), strict=True)
    grams = torch.stack([_gram(A @ basis, F @ basis, d_in) for A, F in pairs])
    metric = InputMetric(grams, stack.weights, off_diagonal=1.0)
    factors = [LoraFactors(f.B, f.A @ basis) for f in stack.factors]
    return replace(stack, factors=factors, inputs=lambda: metric), basis


def _gram(A: Tensor, drift: Tensor, d_in: int) -> Tensor:
    """Return the Gram matrix (q, q) that a drift (r, q) stands for, of trace 1 + `_ISOTROPIC`.

    A drift that is small beside the factor itself counts less: rounding is no input.
    """
    energy, share = _strength(A, drift)
    equal = torch.eye(drift.shape[1], dtype=drift.dtype) / d_in
    return drift.mT @ drift / energy + (1 + _ISOTROPIC - share) * equal


def _strength(A: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energy of a drift with what makes rounding count little, and its share of that."""
    energy = drift.square().sum()
    whole = energy + _LEAST * A.square().sum().clamp_min(torch.finfo(A.dtype).tiny)
    return whole, energy / whole


def _calm(stack: ModuleStack, damping: float) -> ModuleStack:
    """Return the stack with shared output directions damped, the mean norm of its updates kept.

    Nothing is damped where adapters share no start, or have not moved from it: their merge is the
    mean. Adapters without the module crowd nothing.
    """
    if damping < 0:
        raise ValueError(f"damping must be at least 0, got {damping!r}")
    pairs = zip(stack.As, drifts(stack.As), strict=True)
    moved = max(float(_strength(A, F)[1]) for A, F in pairs)
    there = stack.weights * stack.weights.new_tensor([f.rank > 0 for f in stack.factors])
    if not there.any():
        return stack
    calm = damped(stack.factors, there / there.sum(), damping * moved)
    before, after = (
        sum(float(w) * product_energy(*f) ** 0.5 for w, f in zip(there, many, strict=True))
        for many in (stack.factors, calm)
    )
    gain = before / after if after else 1.0
    return replace(stack, factors=[LoraFactors(f.B * gain, f.A) for f in calm])


def _truncate(update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack) -> Truncated:
    """Truncate in the metric of the drift."""
    if not isinstance(update, LoraFactors):
        raise TypeError(f"update must be factors, got {type(update).__name__}")
    reduced, basis = _in_drift_metric(stack)
    found = truncate_in_metric(LoraFactors(update.B, update.A @ basis), rank, reduced)
    return found._replace(factors=LoraFactors(found.factors.B, found.factors.A @ basis.mT))


@register(
    "regmean-drift",
    summary="regression mean in the metric of the adapters' drift from a shared start, damped",
    paper="RegMean, arXiv 2212.09849, its statistics read from the adapters (this project); "
    "damping of Pico, arXiv 2604.16826",
    weighted=True,
    truncation=_truncate,
)
def regmean_drift(stack: ModuleStack, *, damping: float = 1.0) -> LoraFactors:
    """Return Σ_k γ D Δ_k G_k (Σ_j G_j)⁻¹ with G_k = F_kᵀ F_k / ‖F_k‖² + 0.01 I / d_in, nearly.

    D scales the output directions of many updates down, to the power `damping` (0: not at all), and
    γ gives the updates their mean norm back.
    """
    reduced, basis = _in_drift_metric(_calm(stack, damping))
    found = regmean(reduced)
    return LoraFactors(found.B, found.A @ basis.mT)


@register(
    "tc-lora-drift",
    summary="joint CP in the metric of the adapters' drift from a shared start, damped; no data",
    paper=f"{PAPER}; damping of Pico, arXiv 2604.16826",
    exact=False,
    weighted=True,
    truncation=_truncate,
)
def tc_lora_drift(stack: ModuleStack, *, damping: float = 1.0) -> LoraFactors:
    """Return `tc_lora_activation` with G_k, D and γ as of `regmean_drift`."""
    reduced, basis = _in_drift_metric(_calm(stack, damping))
    found = tc_lora_activation(reduced)
    return LoraFactors(found.B, found.A @ basis.mT)


def _truncate_in_best(
    update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack
) -> Truncated:
    """Truncate in the metric of the inputs where it is known, else in the drift's."""
    return (truncate_in_metric if stack.inputs else _truncate)(update, rank, stack)


@register(
    "tc-lora",
    summary="tc-lora-activation where activation statistics are given, else tc-lora-drift",
    paper=PAPER,
    exact=False,
    needs="statistics if any",
    weighted=True,
    truncation=_truncate_in_best,
)
def tc_lora(stack: ModuleStack) -> LoraFactors:
    """Return the best joint CP merge that the available inputs allow."""
    return tc_lora_activation(stack) if stack.inputs else tc_lora_drift(stack)
