"""Elementwise steps that sparse merges are composed of: sparsify, elect a sign, combine.

References
----------
Yadav et al. (2023), "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.
Yu et al. (2024), "Language Models are Super Mario" (DARE), arXiv 2311.03099.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def check_fraction(name: str, value: float) -> None:
    """Refuse a density outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def magnitude_cutoff(blocks: Iterable[Tensor], density: float) -> float:
    """Return the magnitude that the largest `density` share of all elements reaches.

    Parameters
    ----------
    blocks : iterable of Tensor
        The elements, in blocks of any shape; compared in single precision.
    density : float
        Fraction to keep (0–1); the number kept is rounded down.

    Notes
    -----
    Holds all elements at once: one adapter's update of one module, some 16 bytes per element.
    """
    magnitudes = torch.cat([block.abs().float().flatten() for block in blocks])
    keep = int(density * magnitudes.numel())
    if keep == 0:
        return float("inf")
    return float(magnitudes.kthvalue(magnitudes.numel() - keep + 1).values)


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
