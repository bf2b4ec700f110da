"""Sparse merges in a shared basis: KnOTS and Core Space, exact in factor space.

Both express all updates in bases they share, run an elementwise merge on the coordinates, and leave
the bases again. Signs of the basis vectors do not matter to these steps; how each update was split
into B and A does not either.

Symbols: K adapters, d_out × d_in a module, m × n the core that holds all updates.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.elementwise import (
    check_fraction,
    disjoint_mean,
    drop_and_rescale,
    keep_largest,
    magnitude_cutoff,
)
from tclora.merge.registry import register
from tclora.merge.spans import reduced_core, significant
from tclora.merge.stack import ModuleStack

_KNOTS = "Stoica et al. 2025, Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735"


@register(
    "knots-ties",
    summary="TIES on the right factors of a joint SVD (per module, unweighted)",
    paper=_KNOTS,
)
def knots_ties(stack: ModuleStack, *, density: float = 1.0, scale: float = 1.0) -> LoraFactors:
    """Return λ U · disjoint mean of S V_kᵀ, with [Δ_1 … Δ_K] = U S [V_1ᵀ … V_Kᵀ]."""
    check_fraction("density", density)
    return _knots(stack, lambda blocks: scale * disjoint_mean(_trim(blocks, density)))


@register(
    "knots-dare",
    summary="DARE, then the disjoint mean, on the right factors of a joint SVD (per module)",
    paper=_KNOTS,
)
def knots_dare(stack: ModuleStack, *, density: float = 0.9, scale: float = 1.0) -> LoraFactors:
    """Return λ U · disjoint mean of randomly thinned S V_kᵀ."""
    check_fraction("density", density)
    generator = stack.generator()
    return _knots(
        stack,
        lambda blocks: scale * disjoint_mean(drop_and_rescale(blocks, density, generator)),
    )


def _knots(stack: ModuleStack, merge: Callable[[Tensor], Tensor]) -> LoraFactors:
    core = stack.core
    rows = core.B @ core.A  # (K, m, n)
    U, S, _ = torch.linalg.svd(rows.transpose(0, 1).flatten(1), full_matrices=False)
    basis = U[:, significant(S)]
    blocks = ((basis.mT @ core.B) @ core.A) @ core.right.mT  # (K, q, d_in)
    return LoraFactors(core.left @ basis, merge(blocks))


@register(
    "core-space",
    summary="TIES on the cores in the joint singular bases of all balanced factors (per module)",
    paper="Panariello et al. 2025, Low-Rank Model Merging in Core Space, arXiv 2509.17786",
)
def core_space(stack: ModuleStack, *, density: float = 0.2, scale: float = 1.0) -> LoraFactors:
    """Return λ Q_B · disjoint mean of Q_Bᵀ Δ_k Q_A · Q_Aᵀ."""
    check_fraction("density", density)
    reduced = reduced_core(stack)
    merged = scale * disjoint_mean(_trim(reduced.cores, density))
    return LoraFactors(reduced.left @ merged, reduced.right.mT)


def _trim(blocks: Tensor, density: float) -> Tensor:
    """Keep the `density` largest elements of each adapter's block (K, m, n)."""
    if density == 1:
        return blocks
    cutoffs = [magnitude_cutoff(partial(list, [block]), density) for block in blocks]
    return keep_largest(blocks, torch.tensor(cutoffs))
