"""Truncation of a merged update to a given rank, and what it loses.

Symbols: d_out × d_in the module, q the rank of the update, R the rank asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.stack import ModuleStack
from tclora.tensor.starts import slice_svd

# Dense updates with a side up to this get a full SVD, larger ones subspace iteration.
_EXACT_SIDE = 2048
_OVERSAMPLING, _POWER_ITERATIONS = 32, 6


class Truncated(NamedTuple):
    """A merged update at its final rank, and its energies in the truncation's own metric."""

    factors: LoraFactors
    energy: float  # squared norm before truncation
    lost: float  # squared norm of what truncation removed


def truncate(update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack) -> Truncated:
    """Return the best rank-R approximation of an update in the Frobenius norm.

    Parameters
    ----------
    update : LoraFactors or Tensor, shape (d_out, d_in)
        The merged update; a dense one comes back as factors.
    rank : int or None
        Rank R; None leaves factors as they are and brings a dense update to Σ r_k.
    stack : ModuleStack
        What was merged.

    Returns
    -------
    Truncated
    """
    if isinstance(update, LoraFactors):
        if rank is None or update.rank <= rank:
            return Truncated(update, energy=energy(update), lost=0.0)
        return from_svd(*thin_svd(update), rank)
    rank = stack.total_rank if rank is None else rank
    if min(update.shape) <= _EXACT_SIDE:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        return from_svd(U, S, Vh.mT, rank)
    factors, _, _ = from_svd(*leading_svd(update, rank, stack.generator()), rank)
    total = float(update.double().square().sum())
    return Truncated(factors, total, max(0.0, total - energy(factors)))


def leading_svd(
    matrix: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return at least R leading singular triplets of a large dense matrix by subspace iteration.

    Parameters
    ----------
    matrix : Tensor, shape (d_out, d_in)
    rank : int
        How many triplets matter.
    generator : torch.Generator
        Source of the first subspace.

    Returns
    -------
    U, S, V : Tensor
        Shapes (d_out, p), (p,), (d_in, p).

    References
    ----------
    Halko, Martinsson, Tropp (2011), "Finding Structure with Randomness", SIAM Review 53(2).
    """
    p = min(rank + _OVERSAMPLING, *matrix.shape)
    Q = torch.randn(matrix.shape[1], p, generator=generator).to(matrix)
    for _ in range(_POWER_ITERATIONS):
        Q, _ = torch.linalg.qr(matrix @ Q)
        Q, _ = torch.linalg.qr(matrix.mT @ Q)
    U, S, Wh = torch.linalg.svd(matrix @ Q, full_matrices=False)
    return U, S, Q @ Wh.mT


def truncate_to_one(
    update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack
) -> Truncated:
    """Truncate as `truncate` does, by default to the largest LoRA rank among the adapters."""
    largest = max(factors.rank for factors in stack.factors)
    return truncate(update, largest if rank is None else rank, stack)


def energy(update: LoraFactors) -> float:
    """Return ‖B A‖² through the rank-sized Gram matrices."""
    B, A = update
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0))


def thin_svd(update: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (d_out, p), S (p,), V (d_in, p) with B A = U diag(S) Vᵀ and p ≤ q."""
    return slice_svd(update.B, update.A)


def from_svd(U: Tensor, S: Tensor, V: Tensor, rank: int) -> Truncated:
    """Keep the R strongest singular pairs, their values split evenly between both factors."""
    root = S[:rank].sqrt()
    factors = LoraFactors(U[:, :rank] * root, (V[:, :rank] * root).mT)
    total = float(S.square().sum())
    return Truncated(factors, energy=total, lost=float(S[rank:].square().sum()))
