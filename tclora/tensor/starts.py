"""Starting points of the CP solver: paired singular vectors, then random ones.

Symbols: M modules, K adapters, m × n the core, r the LoRA rank, R the CP rank.
"""

import torch
from torch import Tensor


def starting_points(
    B: Tensor, A: Tensor, rank: int, n_starts: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Return `n_starts` pairs of factor matrices to start from.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
        Output factors of the cores.
    A : Tensor, shape (M, K, r, n)
        Input factors of the cores.
    rank : int
        CP rank R.
    n_starts : int
        How many, at least 1.
    generator : torch.Generator
        Source of the random starts and of columns that a deterministic start lacks.

    Returns
    -------
    list of (U, V)
        Shapes (M, m, R) and (M, n, R).

    Notes
    -----
    In this order: the R strongest singular pairs among all slices, which reproduces the stack
    exactly at R = K r; the singular pairs of the sum of the slices, exact for identical adapters;
    the leading vectors of the two unfoldings (HOSVD); Gaussian matrices.
    """
    nothing = B.new_zeros(B.shape[0], 0, 0)
    starts = []
    for index in range(n_starts):
        U, V = _MAKERS[index](B, A, rank) if index < len(_MAKERS) else (nothing, nothing)
        U = _fill(U, B.shape[2], rank, generator)
        V = _fill(V, A.shape[3], rank, generator)
        starts.append((U, V))
    return starts


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


def slice_components(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the strongest singular pairs among all slices as a CP model of rank ≤ R.

    Each component belongs to one slice; with as many components as the slices have ranks in all,
    the model is exact.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
    A : Tensor, shape (M, K, r, n)
    rank : int
        CP rank R.

    Returns
    -------
    U, V, C : Tensor
        Shapes (M, m, R), (M, n, R) and (M, K, R), with K min(m, r, n) columns if that is fewer.
    """
    U, S, V = slice_svd(B, A)
    strongest = S.flatten(1).argsort(dim=1, descending=True, stable=True)[:, None, :rank]
    C = torch.diag_embed(S.mT).permute(0, 2, 3, 1)  # (M, K, K, q): zero but on its own slice
    return _columns(U, strongest), _columns(V, strongest), _columns(C, strongest)


def _slices(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, V, _ = slice_components(B, A, rank)
    return U, V


def _columns(blocks: Tensor, chosen: Tensor) -> Tensor:
    """Pick from the blocks (M, K, d, q) laid side by side the columns (M, 1, R): (M, d, R)."""
    columns = blocks.transpose(1, 2).flatten(2)  # (M, d, K q)
    return columns.gather(2, chosen.expand(-1, columns.shape[1], -1))


def _mean(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, _, V = slice_svd(B.transpose(1, 2).flatten(2), A.flatten(1, 2))
    return U[..., :rank], V[..., :rank]


def _unfoldings(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows = (B @ (A @ A.mT) @ B.mT).sum(1)  # (M, m, m)
    columns = (A.mT @ (B.mT @ B) @ A).sum(1)  # (M, n, n)
    U, V = (torch.linalg.eigh(gram).eigenvectors.flip(-1) for gram in (rows, columns))
    return U[..., :rank], V[..., :rank]


def _fill(columns: Tensor, d: int, rank: int, generator: torch.Generator) -> Tensor:
    """Complete columns (M, d, ≤ R) to (M, d, R) with Gaussian ones, scaled to unit length."""
    M, _, found = columns.shape
    if found == rank:
        return columns
    extra = torch.randn(M, d, rank - found, generator=generator, dtype=torch.float64)
    extra = extra.to(columns) / d**0.5
    return torch.cat([columns, extra], dim=2) if found else extra


_MAKERS = (_slices, _mean, _unfoldings)
