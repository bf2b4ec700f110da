"""Sparse merges in a shared basis: KnOTS, Core Space, Compress-then-Merge, in factor space.

They express all updates in bases they share, run an elementwise merge on the coordinates, and leave
the bases again. Signs of the basis vectors do not matter to these steps; how each update was split
into B and A does not either, unless Core Space is asked for its published gauge. Merges that do not
depend on the basis, TSV-M and ISO-C, are the same in Core Space as `tsv-m` and `iso-c` here, which
are restricted to the span already.

Symbols: K adapters, d_out × d_in a module, m × n the core that holds all updates.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.methods.elementwise import (
    check_fraction,
    disjoint_mean,
    drop_and_rescale,
    keep_largest,
    magnitude_cutoff,
)
from tclora.merge.methods.spans import reduced_core, significant
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.compress import orthonormal_basis
from tclora.tensor.tucker import tucker2

# Elements of a block of coordinates worked on at once: what fits a processor's cache.
_BLOCK_ELEMENTS = 1 << 19
_KNOTS = "Stoica et al. 2025, Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735"


@register(
    "knots-ties",
    summary="TIES on the right factors of a joint SVD (per module, unweighted)",
    paper=_KNOTS,
)
def knots_ties(stack: ModuleStack, *, density: float = 1.0, scale: float = 1.0) -> LoraFactors:
    """Return λ U · disjoint mean of S V_kᵀ, with [Δ_1 … Δ_K] = U S [V_1ᵀ … V_Kᵀ]."""
    check_fraction("density", density)
    U, rows = _joint_left_basis(stack)
    cutoffs = torch.zeros(len(rows))
    if density < 1:
        cutoffs = torch.tensor(
            [
                magnitude_cutoff(_blocks(rows[k : k + 1], stack.As[k : k + 1]), density)
                for k in range(len(rows))
            ]
        )
    merged = [disjoint_mean(keep_largest(block, cutoffs)) for block in _blocks(rows, stack.As)]
    return LoraFactors(U, scale * torch.cat(merged, dim=1))


@register(
    "knots-dare",
    summary="DARE, then the disjoint mean, on the right factors of a joint SVD (per module)",
    paper=_KNOTS,
)
def knots_dare(stack: ModuleStack, *, density: float = 0.9, scale: float = 1.0) -> LoraFactors:
    """Return λ U · disjoint mean of randomly thinned S V_kᵀ."""
    check_fraction("density", density)
    U, rows = _joint_left_basis(stack)
    generator = stack.generator()
    merged = [
        disjoint_mean(drop_and_rescale(block, density, generator))
        for block in _blocks(rows, stack.As)
    ]
    return LoraFactors(U, scale * torch.cat(merged, dim=1))


def _joint_left_basis(stack: ModuleStack) -> tuple[Tensor, list[Tensor]]:
    """Return U (d_out, q) of the SVD of [Δ_1 … Δ_K], and Uᵀ B_k (q, r_k) for every adapter."""
    left, coordinates = orthonormal_basis(torch.cat(stack.Bs, dim=1))
    lowers = [torch.linalg.qr(A.mT).R.mT for A in stack.As]  # A_k = lower_k · orthonormal rows
    U, S, _ = torch.linalg.svd(coordinates @ torch.block_diag(*lowers), full_matrices=False)
    basis = left @ U[:, significant(S)]
    return basis, [basis.mT @ B for B in stack.Bs]


def _blocks(rows: Sequence[Tensor], As: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield S V_kᵀ = Uᵀ Δ_k of all adapters in column blocks, shape (K, q, columns)."""
    columns = max(1, _BLOCK_ELEMENTS // (len(rows) * max(1, rows[0].shape[0])))
    for start in range(0, As[0].shape[1], columns):
        yield torch.stack(
            [row @ A[:, start : start + columns] for row, A in zip(rows, As, strict=True)]
        )


@register(
    "core-space",
    summary="TIES on the cores in the joint singular bases of all balanced factors (per module)",
    paper="Panariello et al. 2025, Low-Rank Model Merging in Core Space, arXiv 2509.17786",
)
def core_space(
    stack: ModuleStack,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    gauge: Literal["balanced", "published"] = "balanced",
) -> LoraFactors:
    """Return λ Q_B · disjoint mean of Q_Bᵀ Δ_k Q_A · Q_Aᵀ.

    Q_B and Q_A are singular bases of all B_k and all A_k, split evenly between both sides or, as
    published, as they were trained.
    """
    check_fraction("density", density)
    if gauge not in {"balanced", "published"}:
        raise ValueError(f"gauge must be 'balanced' or 'published', got {gauge!r}")
    reduced = reduced_core(stack, as_given=gauge == "published")
    merged = scale * disjoint_mean(_trim(reduced.cores, density))
    return LoraFactors(reduced.left @ merged, reduced.right.mT)


@register(
    "compress-then-merge",
    summary="TIES on the cores in shared R-dimensional bases of the rescaled updates (per module)",
    paper="He et al. 2026, Compress then Merge, arXiv 2606.03723",
)
def compress_then_merge(
    stack: ModuleStack, *, density: float = 0.3, beta: float = 0.0, scale: float = 1.0
) -> LoraFactors:
    """Return λ U · disjoint mean of Uᵀ Δ_k V · Vᵀ, of rank R by construction.

    U and V are the Tucker-2 bases of the updates at norms β ‖Δ_k‖ + (1 − β) times their mean, so
    that with β = 0 all count the same; R is the largest LoRA rank unless asked for.
    """
    check_fraction("density", density)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta!r}")
    core, cores = stack.core, stack.core.core
    norms = cores.square().sum((1, 2), keepdim=True).sqrt()
    aim = beta * norms + (1 - beta) * norms.mean()
    largest = max(factors.rank for factors in stack.factors)
    U, V = tucker2(
        cores / torch.where(norms > 0, norms, 1) * aim,
        largest if stack.rank is None else stack.rank,
    )
    merged = scale * disjoint_mean(_trim(U.mT @ cores @ V, density))
    return LoraFactors(core.left @ U @ merged, (core.right @ V).mT)


def _trim(blocks: Tensor, density: float) -> Tensor:
    """Keep the `density` largest elements of each adapter's block (K, m, n)."""
    if density == 1:
        return blocks
    cutoffs = [magnitude_cutoff([block], density) for block in blocks]
    return keep_largest(blocks, torch.tensor(cutoffs))
