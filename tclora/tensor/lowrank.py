"""Singular vectors of low-rank products and of large matrices, without any d_out × d_in SVD."""

import torch
from torch import Tensor

_OVERSAMPLING, _POWER_ITERATIONS = 32, 6


def slice_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of each product B A through its rank-r bottleneck.

    Parameters
    ----------
    B : Tensor, shape (..., m, r)
    A : Tensor, shape (..., r, n)

    Returns
    -------
    U, S, V : Tensor
        Shapes (..., m, q), (..., q), (..., n, q) with q = min(m, r, n).
    """
    left, lower = torch.linalg.qr(B)
    right, upper = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(lower @ upper.mT, full_matrices=False)
    return left @ U, S, right @ Vh.mT


def leading_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at least R leading singular triplets of a large dense matrix by subspace iteration.

    Parameters
    ----------
    matrix : Tensor, shape (d_out, d_in)
    rank : int
        How many triplets matter.
    seed : int
        Seed of the first subspace; the global random state stays as it is.

    Returns
    -------
    U, S, V : Tensor
        Shapes (d_out, p), (p,), (d_in, p).

    References
    ----------
    Halko, Martinsson, Tropp (2011), "Finding Structure with Randomness", SIAM Review 53(2).
    """
    p = min(rank + _OVERSAMPLING, *matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, p, niter=_POWER_ITERATIONS)
    return U, S, V


def product_energy(B: Tensor, A: Tensor) -> float:
    """Return ‖B A‖² through the rank-sized Gram matrices."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0))


def as_columns(blocks: Tensor) -> Tensor:
    """Lay blocks (K, d, q) side by side, as the columns of one matrix (d, K q)."""
    return blocks.transpose(0, 1).flatten(1)
