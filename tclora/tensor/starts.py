"""Starting points of the CP solver: paired singular vectors, then random ones.

Symbols: M modules, K adapters, m × n the core, r the LoRA rank, R the CP rank.
"""

import torch
from torch import Tensor

from tclora.tensor.lowrank import slice_svd


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


def slices(B: Tensor, A: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start from the strongest singular pairs among all slices.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
    A : Tensor, shape (M, K, r, n)
    rank : int
        CP rank R.
    generator : torch.Generator
        Source of columns that the slices lack.

    Returns
    -------
    U, V : Tensor
        Shapes (M, m, R) and (M, n, R), as from all starts.
    """
    U, V, _ = slice_components(B, A, rank)
    return fill(U, rank, generator), fill(V, rank, generator)


def mean(B: Tensor, A: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start from the singular pairs of the sum of the slices: exact for identical adapters."""
    U, _, V = slice_svd(B.transpose(1, 2).flatten(2), A.flatten(1, 2))
    return fill(U[..., :rank], rank, generator), fill(V[..., :rank], rank, generator)


def unfoldings(
    B: Tensor, A: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Start from the leading vectors of the two unfoldings (HOSVD)."""
    columns, rows = B.transpose(1, 2).flatten(2), A.flatten(1, 2)  # (M, m, K r), (M, K r, n)
    outputs = (B @ (A @ A.mT)).transpose(1, 2).flatten(2) @ columns.mT  # (M, m, m)
    inputs = rows.mT @ ((B.mT @ B) @ A).flatten(1, 2)  # (M, n, n)
    U, V = (torch.linalg.eigh(gram).eigenvectors.flip(-1) for gram in (outputs, inputs))
    return fill(U[..., :rank], rank, generator), fill(V[..., :rank], rank, generator)


def gaussian(B: Tensor, A: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start from Gaussian matrices."""
    return fill(B[:, 0, :, :0], rank, generator), fill(A[:, 0, :0].mT, rank, generator)


def fill(columns: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Complete columns (M, d, ≤ R) to (M, d, R) with Gaussian ones of about unit length."""
    M, d, found = columns.shape
    extra = torch.randn(M, d, rank - found, generator=generator, dtype=torch.float64)
    return torch.cat([columns, extra.to(columns) / d**0.5], dim=2)


def _columns(blocks: Tensor, chosen: Tensor) -> Tensor:
    """Pick from the blocks (M, K, d, q) laid side by side the columns (M, 1, R): (M, d, R)."""
    columns = blocks.transpose(1, 2).flatten(2)  # (M, d, K q)
    return columns.gather(2, chosen.expand(-1, columns.shape[1], -1))
