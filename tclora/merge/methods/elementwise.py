"""Elementwise steps that sparse merges are composed of: sparsify, elect a sign, combine.

References
----------
Yadav et al. (2023), "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.
Yu et al. (2024), "Language Models are Super Mario" (DARE), arXiv 2311.03099.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 16
_BINS = 1 << _HALF


def check_fraction(name: str, value: float) -> None:
    """Refuse a density outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def magnitude_cutoff(blocks: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the magnitude that the largest `density` share of all elements reaches.

    Parameters
    ----------
    blocks : callable
        Returns the elements block by block, the same ones each time it is called.
    density : float
        Fraction to keep (0–1); the number kept is rounded down.

    Notes
    -----
    Exact to single precision in two passes and constant memory: counts over the upper, then the
    lower half of the bits, whose order is that of the magnitudes.
    """
    upper = _count(_bits(block) >> _HALF for block in blocks())
    keep = int(density * int(upper.sum()))
    if keep == 0:
        return float("inf")
    high, above = _bin_of(upper, keep)
    lower = _count(
        (bits := _bits(block))[(bits >> _HALF) == high] & (_BINS - 1) for block in blocks()
    )
    low, _ = _bin_of(lower, keep - above)
    return float(torch.tensor((high << _HALF) | low, dtype=torch.int32).view(torch.float32))


def _bits(block: Tensor) -> Tensor:
    return block.abs().to(torch.float32).contiguous().view(torch.int32)


def _count(values: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_BINS, dtype=torch.int64)
    for value in values:
        total += torch.bincount(value.flatten(), minlength=_BINS)
    return total


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the rank-th largest element and how many lie in higher bins."""
    reached = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(reached, rank))
    return _BINS - 1 - index, int(reached[index - 1]) if index else 0


def keep_largest(stack: Tensor, cutoffs: Tensor) -> Tensor:
    """Set to zero what lies below each adapter's cutoff; stack (K, ...), cutoffs (K,)."""
    if not cutoffs.any():
        return stack
    limits = cutoffs.to(stack).reshape(-1, *[1] * (stack.ndim - 1))
    return torch.where(stack.abs().to(torch.float32) >= limits, stack, 0.0)


def disjoint_mean(stack: Tensor) -> Tensor:
    """Average, elementwise, the entries whose sign wins; stack (K, ...) → (...).

    The sign of the unweighted sum wins (a tie is positive); the average is over the entries that
    have it, not over all K.
    """
    sign = torch.where(stack.sum(0) >= 0, 1, -1).to(stack.dtype)
    agreeing = (stack * sign).clamp_min_(0)  # magnitude where the sign won, else 0
    return sign * agreeing.sum(0) / (agreeing > 0).sum(0).clamp_min_(1)


def drop_and_rescale(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each element with probability `density`, divided by it, else set it to zero."""
    kept = torch.rand(stack.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(kept.to(stack.device), stack / density, 0.0)
