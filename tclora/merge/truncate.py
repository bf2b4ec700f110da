"""Truncation of a merged update to a given rank, and what it loses.

Symbols: d_out × d_in the module, q the rank of the update, R the rank asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.stack import ModuleStack
from tclora.tensor.lowrank import leading_svd, product_energy, slice_svd

# Dense updates with a side up to this get a full SVD, larger ones subspace iteration.
_EXACT_SIDE = 2048


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
            return Truncated(update, energy=product_energy(*update), lost=0.0)
        return from_svd(*slice_svd(*update), rank)
    rank = stack.total_rank if rank is None else rank
    if min(update.shape) <= _EXACT_SIDE:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        return from_svd(U, S, Vh.mT, rank)
    factors, _, _ = from_svd(*leading_svd(update, rank, stack.seed), rank)
    total = float(update.double().square().sum())
    return Truncated(factors, total, max(0.0, total - product_energy(*factors)))


def truncate_to_one(
    update: LoraFactors | Tensor, rank: int | None, stack: ModuleStack
) -> Truncated:
    """Truncate as `truncate` does, by default to the largest LoRA rank among the adapters."""
    largest = max(factors.rank for factors in stack.factors)
    return truncate(update, largest if rank is None else rank, stack)


def from_svd(U: Tensor, S: Tensor, V: Tensor, rank: int) -> Truncated:
    """Keep the R strongest singular pairs, their values split evenly between both factors."""
    root = S[:rank].sqrt()
    factors = LoraFactors(U[:, :rank] * root, (V[:, :rank] * root).mT)
    total = float(S.square().sum())
    return Truncated(factors, energy=total, lost=float(S[rank:].square().sum()))
