"""Activation-aware merges: a joint CP in the metrics of the clusters' own inputs.

Symbols: K adapters, d_out × d_in a module, G_k (d_in, d_in) the Gram matrix of cluster k's inputs,
M = Σ_k G_k, R the CP rank, q the rank of the subspace that the CP is fitted in.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tclora.adapter import LoraFactors
from tclora.merge.methods.cp import PAPER
from tclora.merge.methods.leastsquares import regmean, truncate_in_metric
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.compress import Core, compress
from tclora.tensor.cp import cp_als
from tclora.tensor.lowrank import slice_svd
from tclora.tensor.weighted import weighted_cp

# The subspace of the regression mean that a CP of rank R is fitted in, in multiples of R.
_ROOM = 2
# Energies of updates below this share of the largest are rounding.
_ROUNDING = 1e-12


@register(
    "tc-lora-activation",
    summary="joint CP of the updates regressed on the clusters' own inputs, rank R in that metric",
    paper=PAPER,
    exact=False,
    needs="statistics",
    weighted=True,
    truncation=truncate_in_metric,
)
def tc_lora_activation(stack: ModuleStack, *, emphasis: float = 0.5) -> LoraFactors:
    """Return the joint CP model's component of the regression mean, in the metric M.

    The stack that is factorised holds each cluster's share Δ_k G_k M⁻¹ of the regression mean and,
    as one more slice times `emphasis`, the best rank-R approximation of the mean itself. Its
    loadings are the merge. The larger `emphasis` (above 0), the closer the merge comes to that
    approximation, and the less U and V serve the single clusters.
    """
    grams, root = _metric(stack, emphasis)
    shares = [
        torch.linalg.solve_triangular(root.mT, A @ gram, upper=True, left=False)
        for A, gram in zip(stack.As, grams, strict=True)
    ]  # A_k G_k M⁻¹ root, (r_k, d_in)
    core = compress(stack.Bs, shares)
    rank = _rank(stack)
    B, A = _with_mean(core, rank, emphasis)
    # The start, an SVD of the mean, is next to the optimum: more sweeps change the merge by 2 %.
    solution = cp_als(B[None], A[None], rank, n_starts=1, n_iter=20)
    V = torch.linalg.solve_triangular(
        root, (core.right @ solution.V[0]).mT, upper=False, left=False
    )
    return LoraFactors((core.left @ solution.U[0]) * (solution.C[0, -1] / emphasis), V)


def _metric(stack: ModuleStack, emphasis: float) -> tuple[Tensor, Tensor]:
    """Return all G_k (K, d_in, d_in) and a root of M = root rootᵀ; refuse a false emphasis."""
    if not 0 < emphasis < math.inf:
        raise ValueError(f"emphasis must be above 0 and finite, got {emphasis!r}")
    return stack.metric.grams, stack.metric.root


def _rank(stack: ModuleStack) -> int:
    """Return the CP rank R: that asked for, else the largest LoRA rank among the adapters."""
    largest = max(f.rank for f in stack.factors)
    return min(stack.total_rank, largest if stack.rank is None else stack.rank)


def _with_mean(core: Core, rank: int, emphasis: float) -> tuple[Tensor, Tensor]:
    """Append the rank-R truncated sum of the slices: B (K + 1, m, q), A (K + 1, q, n)."""
    U, S, V = slice_svd(core.B.transpose(0, 1).flatten(1), core.A.flatten(0, 1))
    left, right = emphasis * (U * S)[:, :rank], V[:, :rank].mT
    q = max(core.B.shape[2], left.shape[1])
    B = torch.cat([_widen(core.B, q), _widen(left[None], q)])
    A = torch.cat([_widen(core.A.mT, q), _widen(right.mT[None], q)]).mT
    return B, A.contiguous()


def _widen(blocks: Tensor, columns: int) -> Tensor:
    """Append zero columns to blocks (K, d, q)."""
    return pad(blocks, (0, columns - blocks.shape[2]))


@register(
    "tc-lora-metric",
    summary="joint CP of the updates, each in the metric of its own cluster's inputs, and their "
    "regression mean",
    paper=PAPER,
    exact=False,
    needs="statistics",
    weighted=True,
    truncation=truncate_in_metric,
)
def tc_lora_metric(stack: ModuleStack, *, emphasis: float = 3.0) -> LoraFactors:
    """Return the regression mean's component of a CP model that fits the adapters as well.

    The CP minimises Σ_k γ_k ‖(U g_k V − Δ_k) G_k^{1/2}‖² plus emphasis² ‖(U s V − Δ) M^{1/2}‖²,
    where Δ is the regression mean (RegMean), g_k and s are diagonal, and γ_k lets adapters count
    the same, whatever their norms, down to 1e-6 of the largest. U and V stay in the span of Δ's
    2 R strongest singular pairs in the metric M, so that of an adapter that is small beside the
    others they can hold what it shares with these pairs alone. The merge is U s V; a routed library
    fits its gates to U and V anew (`tclora.route.fit_gates`). The larger `emphasis` (above 0), the
    closer the merge comes to RegMean truncated to rank R, and the less U and V serve the clusters.
    """
    grams, root = _metric(stack, emphasis)
    mean = regmean(stack)
    left, S, right = slice_svd(mean.B, mean.A @ root)
    rank = _rank(stack)
    q = min(_ROOM * rank, len(S))
    left, S = left[:, :q], S[:q]
    right = torch.linalg.solve_triangular(root, right[:, :q].mT, upper=False, left=False)
    # In these bases M is the identity, and the metrics of the clusters add up to it.
    cross = torch.stack(
        [
            (left.mT @ f.B) @ (f.A @ gram @ right.mT)
            for f, gram in zip(stack.factors, grams, strict=True)
        ]
    )
    metrics = right @ grams @ right.mT
    equal = _equal_shares(stack)[:, None, None]
    strength = emphasis**2
    identity = torch.eye(q, dtype=S.dtype, device=S.device)
    solution = weighted_cp(
        torch.cat([equal * cross, strength * S.diag()[None]]),
        torch.cat([equal * metrics, strength * identity[None]]),
        identity[:, :rank],
        identity[:, :rank],
    )
    return LoraFactors(left @ solution.U * solution.C[-1], solution.V.mT @ right)


def _equal_shares(stack: ModuleStack) -> Tensor:
    """Return γ (K,), in inverse proportion to ‖Δ_k G_k^{1/2}‖² but for the adapters' weights."""
    pairs = zip(stack.factors, stack.metric.grams, strict=True)
    weighted = torch.stack([((f.B.mT @ f.B) * (f.A @ gram @ f.A.mT)).sum() for f, gram in pairs])
    weights = stack.weights.to(weighted)
    there = (weights > 0) & (weighted > 0)
    energies = weighted / torch.where(there, weights, 1)
    least = _ROUNDING * energies.max()
    return torch.where(
        there, energies.sum() / there.sum().clamp_min(1) / energies.clamp_min(least), 0
    )
