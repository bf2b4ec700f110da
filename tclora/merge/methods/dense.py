"""Elementwise merges of the updates themselves: no factored form exists, so the result is lossy.

One module's merged update is built in row blocks, in single precision, and truncated; the K dense
updates never exist at once. Thresholds are per adapter and module, unlike the published TIES, whose
threshold is over the whole model.

Symbols: K adapters, d_out × d_in a module.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tclora.merge.methods.elementwise import (
    check_fraction,
    disjoint_mean,
    drop_and_rescale,
    keep_largest,
    magnitude_cutoff,
)
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack

_BLOCK_ELEMENTS = 1 << 24
_TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
_DARE = "Yu et al. 2024, Language Models are Super Mario, arXiv 2311.03099"


@register(
    "ties",
    summary="trim small elements, elect signs, average those that agree (per module, unweighted)",
    paper=_TIES,
    exact=False,
)
def ties(stack: ModuleStack, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Return λ times the disjoint mean of the `density` largest elements of each update."""
    cutoffs = _cutoffs(stack, density)
    return _combine(stack, lambda blocks: scale * disjoint_mean(keep_largest(blocks, cutoffs)))


@register(
    "magnitude-pruning",
    summary="average of the updates' largest elements",
    paper="PEFT add_weighted_adapter(combination_type='magnitude_prune_svd')",
    exact=False,
    weighted=True,
)
def magnitude_pruning(stack: ModuleStack, *, density: float = 0.2) -> Tensor:
    """Return Σ_k w_k Δ_k with only the `density` largest elements of each update."""
    cutoffs = _cutoffs(stack, density)
    return _combine(stack, lambda blocks: _average(stack, keep_largest(blocks, cutoffs)))


@register(
    "dare",
    summary="average of the updates with random elements dropped and the rest rescaled",
    paper=_DARE,
    exact=False,
    weighted=True,
)
def dare(stack: ModuleStack, *, density: float = 0.2) -> Tensor:
    """Return Σ_k w_k Δ_k with each element kept with probability `density` and divided by it."""
    check_fraction("density", density)
    generator = stack.generator()
    return _combine(
        stack, lambda blocks: _average(stack, drop_and_rescale(blocks, density, generator))
    )


@register(
    "dare-ties",
    summary="random dropping, then sign election and disjoint average (per module, unweighted)",
    paper=_DARE,
    exact=False,
)
def dare_ties(stack: ModuleStack, *, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Return λ times the disjoint mean of randomly thinned updates."""
    check_fraction("density", density)
    generator = stack.generator()
    return _combine(
        stack,
        lambda blocks: scale * disjoint_mean(drop_and_rescale(blocks, density, generator)),
    )


def _cutoffs(stack: ModuleStack, density: float) -> Tensor:
    check_fraction("density", density)
    if density == 1:
        return torch.zeros(len(stack.factors))
    cutoffs = [
        magnitude_cutoff(_blocks(replace(stack, factors=[factors])), density)
        for factors in stack.factors
    ]
    return torch.tensor(cutoffs)


def _combine(stack: ModuleStack, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Merge row block by row block into one dense update (d_out, d_in)."""
    return torch.cat([combine(block) for block in _blocks(stack)])


def _average(stack: ModuleStack, blocks: Tensor) -> Tensor:
    mean: Tensor = torch.tensordot(stack.weights.to(blocks), blocks, dims=1)
    return mean


def _blocks(stack: ModuleStack) -> Iterator[Tensor]:
    """Yield the dense updates in row blocks, shape (K, rows, d_in)."""
    d_out, d_in = stack.factors[0].shape
    rows = max(1, _BLOCK_ELEMENTS // (len(stack.factors) * d_in))
    single = [(f.B.float(), f.A.float()) for f in stack.factors]
    for start in range(0, d_out, rows):
        yield torch.stack([B[start : start + rows] @ A for B, A in single])
