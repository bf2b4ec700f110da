"""The regression mean of the updates on the clusters' own inputs.

Symbols: K adapters, d_out × d_in a module, G_k (d_in, d_in) the Gram matrix of cluster k's inputs.
"""

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.merge.truncate import Truncated, from_svd
from tclora.tensor.lowrank import product_energy, slice_svd


def truncate_in_metric(
    update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack
) -> Truncated:
    """Return the best rank-R approximation in the metric of all inputs, M = Σ_k G_k.

    The error is ‖(Δ − Δ_R) M^{1/2}‖, the mean squared change of the module's outputs. Arguments
    as in `truncate`; the update must be factors.
    """
    if not isinstance(update, LoraFactors):
        raise TypeError(f"update must be factors, got {type(update).__name__}")
    root = stack.metric.root  # M = root rootᵀ
    weighted = LoraFactors(update.B, update.A @ root)
    if rank is None or update.rank <= rank:
        return Truncated(update, energy=product_energy(*weighted), lost=0.0)
    factors, total, lost = from_svd(*slice_svd(*weighted), rank)
    A = torch.linalg.solve_triangular(root, factors.A, upper=False, left=False)
    return Truncated(LoraFactors(factors.B, A), total, lost)


@register(
    "regmean",
    summary="regression mean of the updates on the clusters' own inputs, exact at rank Σ r_k",
    paper="Jin et al. 2023, Dataless Knowledge Fusion (RegMean), arXiv 2212.09849",
    needs="statistics",
    weighted=True,
    truncation=truncate_in_metric,
)
def regmean(stack: ModuleStack) -> LoraFactors:
    """Return Σ_k Δ_k G_k (Σ_j G_j)⁻¹, the minimiser of Σ_k ‖(Δ − Δ_k) G_k^{1/2}‖²."""
    metric = stack.metric
    rows = torch.cat([A @ gram for A, gram in zip(stack.As, metric.grams, strict=True)])
    return LoraFactors(torch.cat(stack.Bs, dim=1), torch.cholesky_solve(rows.mT, metric.root).mT)
