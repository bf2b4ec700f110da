"""Merges of singular vectors: TSV-M, ISO-C and ISO-CTS, on the span of the updates.

The published forms work on full-rank matrices. On low-rank updates they would average over
null-space singular vectors, which rounding chooses; here every step is restricted to the span,
whose dimension is at most Σ r_k, and equals the published result where the updates fill the space.

Isotropic merges choose their R directions before they flatten: a flat spectrum has no order, and to
truncate it would let rounding choose.

Symbols: K adapters, d_out × d_in a module, m × n the core that holds all updates, R the rank asked
for.
"""

import torch

from tclora.adapter import LoraFactors
from tclora.merge.methods.elementwise import check_fraction
from tclora.merge.methods.spans import nearest_orthonormal, reduced_core, significant
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.lowrank import as_columns, slice_svd

_ISO = "Marczak et al. 2025, No Task Left Behind, arXiv 2502.04959"


@register(
    "tsv-m",
    summary="singular vectors of all updates made orthonormal together (all r_k components each)",
    paper="Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081",
)
def tsv_m(stack: ModuleStack, *, components: int | None = None, scale: float = 1.0) -> LoraFactors:
    """Return λ Ũ diag(S) Ṽᵀ, with Ũ, Ṽ the polar factors of all left and right singular vectors.

    `components` limits the singular vectors taken from each update.
    """
    core = stack.core
    U, S, V = slice_svd(core.B, core.A)
    kept = significant(S[:, :components].flatten())
    left = nearest_orthonormal(as_columns(U[..., :components])[:, kept])
    right = nearest_orthonormal(as_columns(V[..., :components])[:, kept])
    values = scale * S[:, :components].flatten()[kept]
    return LoraFactors((core.left @ left) * values, (core.right @ right).mT)


@register(
    "iso-c",
    summary="sum of the updates, its R leading singular values (or all) set to their mean",
    paper=_ISO,
)
def iso_c(stack: ModuleStack, *, scale: float = 1.0) -> LoraFactors:
    """Return λ s̄ U_R V_Rᵀ for the leading R singular triplets of Σ_k Δ_k, on the span without R."""
    sum_ = stack.concatenated(stack.weights.new_ones(len(stack.factors)))
    U, S, V = (part[..., : stack.rank] for part in slice_svd(*sum_))
    kept = significant(S)
    mean = S[kept].mean() if kept.any() else S.new_zeros(())
    return LoraFactors(scale * mean * U[:, kept], V[:, kept].mT)


@register(
    "iso-cts",
    summary="ISO-C with the weakest common directions replaced by each adapter's own",
    paper=_ISO,
)
def iso_cts(stack: ModuleStack, *, common_fraction: float = 0.8, scale: float = 1.0) -> LoraFactors:
    """Return λ s̄ Ũ Ṽᵀ over R leading directions, common ones and each update's own remainder.

    Without R there are as many directions as the updates span.
    """
    check_fraction("common_fraction", common_fraction)
    reduced = reduced_core(stack)
    total = min(reduced.cores.shape[1:])
    total = total if stack.rank is None else min(total, stack.rank)
    common, own = _split(total, len(reduced.cores), common_fraction)
    U, S, Vh = torch.linalg.svd(reduced.cores.sum(0), full_matrices=False)
    common = min(common, int(significant(S).sum()))
    shared = U[:, :common]
    rest = reduced.cores - shared @ (shared.mT @ reduced.cores)
    own_U, own_S, own_Vh = torch.linalg.svd(rest, full_matrices=False)
    values = torch.cat([own_S[:, :own].flatten(), S[:common]])
    kept = significant(values)
    left = torch.cat([as_columns(own_U[..., :own]), shared], dim=1)[:, kept]
    right = torch.cat([as_columns(own_Vh.mT[..., :own]), Vh[:common].mT], dim=1)[:, kept]
    mean = values[kept].mean() if kept.any() else values.new_zeros(())
    return LoraFactors(
        scale * mean * (reduced.left @ nearest_orthonormal(left)),
        (reduced.right @ nearest_orthonormal(right)).mT,
    )


def _split(total: int, K: int, common_fraction: float) -> tuple[int, int]:
    """Divide `total` directions into common ones and equally many for each of K adapters."""
    own = round((total - int(total * common_fraction)) / K)
    return total - own * K, own
