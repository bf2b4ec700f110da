"""Tucker-2 of a stack of updates: one pair of orthonormal bases, a full core per adapter.

Symbols: K adapters, m × n the updates, R the rank of the bases.
"""

import torch
from torch import Tensor

from tclora.tensor.lowrank import as_columns

_SWEEPS, _TOLERANCE = 100, 1e-10


def tucker2(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the bases that keep most of Σ_k ‖Uᵀ X_k V‖², by HOSVD and then HOOI.

    Parameters
    ----------
    stack : Tensor, shape (K, m, n)
        Updates, or their cores in orthonormal bases.
    rank : int
        Columns of each basis; clamped to m and n.

    Returns
    -------
    U, V : Tensor
        Shapes (m, R) and (n, R), orthonormal; the core of adapter k is Uᵀ X_k V.

    References
    ----------
    De Lathauwer, De Moor, Vandewalle (2000), "On the Best Rank-1 and Rank-(R1, …, RN) Approximation
    of Higher-Order Tensors", SIAM J. Matrix Anal. Appl. 21.
    """
    rank = min(rank, *stack.shape[1:])
    V = _leading(stack.flatten(0, 1).mT, rank)
    kept = stack.new_zeros(())
    for _ in range(_SWEEPS):
        U = _leading(as_columns(stack @ V), rank)
        rows = U.mT @ stack  # (K, R, n)
        V = _leading(rows.flatten(0, 1).mT, rank)
        before, kept = kept, (rows @ V).square().sum()
        if kept - before <= _TOLERANCE * kept:
            break
    return U, V


def _leading(columns: Tensor, rank: int) -> Tensor:
    """Return the R leading left singular vectors of columns (d, q); R is at most d."""
    _, vectors = torch.linalg.eigh(columns @ columns.mT)
    leading: Tensor = vectors[:, -rank:].flip(1)
    return leading
