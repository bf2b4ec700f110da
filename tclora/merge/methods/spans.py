"""Orthonormal bases restricted to what the updates really span.

Symbols: K adapters, d_out × d_in the module, m × n the reduced core.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.stack import ModuleStack
from tclora.tensor.compress import Core
from tclora.tensor.lowrank import slice_svd

# Singular values below this share of the largest count as zero.
SPAN_TOLERANCE = 1e-10


@dataclass(frozen=True)
class ReducedCore:
    """K updates in the singular bases of the stacked balanced factors: Δ_k = left @ G[k] @ right.T.

    Attributes
    ----------
    left : Tensor, shape (d_out, m)
        Left singular vectors of [U_1 √S_1 … U_K √S_K], m their numerical rank.
    right : Tensor, shape (d_in, n)
        The same of the right factors.
    cores : Tensor, shape (K, m, n)
        The updates in these bases.
    """

    left: Tensor
    right: Tensor
    cores: Tensor


def reduced_core(stack: ModuleStack, *, as_given: bool = False) -> ReducedCore:
    """Return the updates in the smallest bases that hold them all.

    Balanced factors (equal singular values on both sides) make the bases independent of how each
    update was split into B and A; factors taken as given do not.
    """
    core = stack.core
    B, A = (core.B, core.A) if as_given else _balanced(core)
    left, right = _span(B), _span(A.mT)
    cores = (left.mT @ core.B) @ (core.A @ right)
    return ReducedCore(core.left @ left, core.right @ right, cores)


def balanced(stack: ModuleStack) -> list[LoraFactors]:
    """Return the updates with their singular values split evenly between both factors."""
    core = stack.core
    B, A = _balanced(core)
    return [LoraFactors(core.left @ b, a @ core.right.mT) for b, a in zip(B, A, strict=True)]


def _balanced(core: Core) -> tuple[Tensor, Tensor]:
    """Return balanced factors (K, m, q) and (K, q, n) of the cores."""
    U, S, V = slice_svd(core.B, core.A)  # (K, m, q), (K, q), (K, n, q)
    # Rounding is cut before the square root would lift it above the tolerance.
    root = torch.where(SPAN_TOLERANCE * S.amax(1, keepdim=True) < S, S, 0).sqrt()[:, None]
    return U * root, (V * root).mT


def _span(blocks: Tensor) -> Tensor:
    """Return an orthonormal basis (d, rank) of the columns of all blocks (K, d, q)."""
    U, S, _ = torch.linalg.svd(blocks.transpose(0, 1).flatten(1), full_matrices=False)
    basis: Tensor = U[:, significant(S)]
    return basis


def significant(S: Tensor) -> Tensor:
    """Return which singular values, shape (q,), are not zero up to rounding."""
    return SPAN_TOLERANCE * S.max() < S if S.numel() else S > 0


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """Return the polar factor of columns (d, q), on their span where they are dependent."""
    U, S, Vh = torch.linalg.svd(columns, full_matrices=False)
    kept = significant(S)
    polar: Tensor = U[:, kept] @ Vh[kept]
    return polar
