"""Exact compression of K adapters of one module to a small core (CANDELINC).

With [B_1 … B_K] = Q_B [R_1 … R_K] and the same for A, Δ_k = Q_B (R_k S_k) Q_Aᵀ, so every
Frobenius problem on the stack of updates is the same problem on the cores R_k S_k. The cores
themselves are kept as factors too: a product with them costs (m + n) r instead of m n.

Symbols: K adapters, d_out × d_in the module, r_k the LoRA ranks and r their maximum,
m = min(d_out, Σ r_k), n = min(d_in, Σ r_k).

References
----------
Carroll, Pruzansky, Kruskal (1980), "CANDELINC: A general approach to multidimensional analysis of
many-way arrays with linear constraints on parameters", Psychometrika 45.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Core:
    """K updates of one module in shared orthonormal bases: Δ_k = left @ B[k] @ A[k] @ right.T.

    Attributes
    ----------
    left : Tensor, shape (d_out, m)
        Orthonormal columns that span every B_k.
    right : Tensor, shape (d_in, n)
        Orthonormal columns that span every A_kᵀ.
    B : Tensor, shape (K, m, r)
        Output factors in `left`, zero-padded to a common rank.
    A : Tensor, shape (K, r, n)
        Input factors in `right`, zero-padded to a common rank.
    """

    left: Tensor
    right: Tensor
    B: Tensor
    A: Tensor

    @property
    def core(self) -> Tensor:
        """The core tensor, shape (K, m, n); K m n numbers, so for few adapters only."""
        return self.B @ self.A


def compress(
    Bs: Sequence[Tensor], As: Sequence[Tensor], *, dtype: torch.dtype = torch.float64
) -> Core:
    """Compress the factors of K updates Δ_k = Bs[k] @ As[k] exactly.

    Parameters
    ----------
    Bs : sequence of K Tensor, shape (d_out, r_k)
        Output factors; r_k may be zero.
    As : sequence of K Tensor, shape (r_k, d_in)
        Input factors.
    dtype : torch.dtype
        Type of the computation and the result.

    Returns
    -------
    Core

    Notes
    -----
    Two thin QR decompositions, O((d_out + d_in) (Σ r_k)²). Where Σ r_k reaches a side of the
    module, that side's basis is the identity and costs nothing. No d_out × d_in matrix is built.
    """
    ranks = [A.shape[0] for A in As]
    left, lefts = orthonormal_basis(torch.cat([B.to(dtype) for B in Bs], dim=1))
    right, rights = orthonormal_basis(torch.cat([A.to(dtype).mT for A in As], dim=1))
    return Core(left, right, B=_pad(lefts, ranks), A=_pad(rights, ranks).mT.contiguous())


def orthonormal_basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (d, m) of columns (d, Σ r_k) and their coordinates (m, Σ r_k)."""
    d, total = columns.shape
    if total >= d:
        return torch.eye(d, dtype=columns.dtype, device=columns.device), columns
    basis, coordinates = torch.linalg.qr(columns)
    return basis, coordinates


def _pad(columns: Tensor, ranks: Sequence[int]) -> Tensor:
    """Split columns (m, Σr) into one block per adapter, zero-padded: (K, m, r)."""
    padded = columns.new_zeros(len(ranks), columns.shape[0], max(ranks))
    for target, block in zip(padded, columns.split(list(ranks), dim=1), strict=True):
        target[:, : block.shape[1]] = block
    return padded
