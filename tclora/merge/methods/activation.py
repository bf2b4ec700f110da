"""The activation-aware merge: a joint CP in the metric of the clusters' own inputs.

Symbols: K adapters, d_out × d_in a module, G_k (d_in, d_in) the Gram matrix of cluster k's inputs,
M = Σ_k G_k, R the CP rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tclora.adapter import LoraFactors
from tclora.merge.methods.cp import PAPER
from tclora.merge.methods.leastsquares import truncate_in_metric
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.compress import Core, compress
from tclora.tensor.cp import cp_als
from tclora.tensor.lowrank import slice_svd


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
    if not emphasis > 0:
        raise ValueError(f"emphasis must be above 0, got {emphasis!r}")
    grams, root = stack.metric.grams, stack.metric.root  # M = root rootᵀ
    shares = [
        torch.linalg.solve_triangular(root.mT, A @ gram, upper=True, left=False)
        for A, gram in zip(stack.As, grams, strict=True)
    ]  # A_k G_k M⁻¹ root, (r_k, d_in)
    core = compress(stack.Bs, shares)
    largest = max(f.rank for f in stack.factors)
    rank = min(stack.total_rank, largest if stack.rank is None else stack.rank)
    B, A = _with_mean(core, rank, emphasis)
    # The start, an SVD of the mean, is next to the optimum: more sweeps change the merge by 2 %.
    solution = cp_als(B[None], A[None], rank, n_starts=1, n_iter=20)
    V = torch.linalg.solve_triangular(
        root, (core.right @ solution.V[0]).mT, upper=False, left=False
    )
    return LoraFactors((core.left @ solution.U[0]) * (solution.C[0, -1] / emphasis), V)


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
