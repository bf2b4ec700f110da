"""CP decomposition of slices that are each measured in a metric of their own.

Symbols: K slices S_k (m, n), H_k (n, n) the metric of slice k's rows, R the CP rank; the model is
U diag(c_k) Vᵀ with U (m, R), V (n, R) and C (K, R), and what is minimised is
Σ_k ‖(U diag(c_k) Vᵀ − S_k) H_k^{1/2}‖².
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Added to the diagonal of every system, relative to its mean: components may be collinear.
_RIDGE = 1e-9


class WeightedCP(NamedTuple):
    """Factors of a weighted CP model; columns of U and V are of unit norm, or zero."""

    U: Tensor
    V: Tensor
    C: Tensor


def weighted_cp(
    cross: Tensor, metrics: Tensor, U: Tensor, V: Tensor, *, n_iter: int = 20
) -> WeightedCP:
    """Fit a CP model by alternating least squares, every slice in its own metric.

    Parameters
    ----------
    cross : Tensor, shape (K, m, n)
        S_k H_k, float64.
    metrics : Tensor, shape (K, n, n)
        H_k, symmetric and positive semidefinite.
    U : Tensor, shape (m, R)
        Where to start.
    V : Tensor, shape (n, R)
        Where to start.
    n_iter : int
        Sweeps.

    Returns
    -------
    WeightedCP

    Notes
    -----
    The loadings and U have closed forms. With unequal metrics V has one only in R n unknowns at
    once, so its columns are solved for one after the other. No step raises the error, but for what
    the ridge of every system adds. A sweep costs O(K R n (m + n) + R n³ + K R³).
    """
    U, V = _unit(U), _unit(V)
    C = _loadings(cross, metrics, U, V)
    for _ in range(n_iter):
        U = _unit(_left(cross, metrics, V, C))
        C = _loadings(cross, metrics, U, V)
        V = _unit(_right(cross, metrics, U, V, C))
        C = _loadings(cross, metrics, U, V)
    return WeightedCP(U, V, C)


def _loadings(cross: Tensor, metrics: Tensor, U: Tensor, V: Tensor) -> Tensor:
    system = (U.mT @ U) * (V.mT @ metrics @ V)  # (K, R, R)
    wanted = ((U.mT @ cross) * V.mT).sum(2)
    found: Tensor = torch.linalg.solve(_ridged(system), wanted)
    return found


def _left(cross: Tensor, metrics: Tensor, V: Tensor, C: Tensor) -> Tensor:
    system = (C[:, :, None] * (V.mT @ metrics @ V) * C[:, None]).sum(0)
    wanted = (cross @ V * C[:, None]).sum(0)  # (m, R)
    found: Tensor = torch.linalg.solve(_ridged(system), wanted.mT)
    return found.mT


def _right(cross: Tensor, metrics: Tensor, U: Tensor, V: Tensor, C: Tensor) -> Tensor:
    overlap, V = U.mT @ U, V.clone()
    wanted = torch.einsum("kr,krn->rn", C, U.mT @ cross)
    systems = torch.einsum("kr,kij->rij", C.square(), metrics) * overlap.diagonal()[:, None, None]
    roots = torch.linalg.cholesky(_ridged(systems))
    seen = V.mT @ metrics  # (K, R, n), rows v_ρᵀ H_k
    for r, root in enumerate(roots):
        shares = C * overlap[r] * C[:, r, None]  # (K, R)
        shares[:, r] = 0
        rest = wanted[r] - (shares[:, :, None] * seen).sum((0, 1))
        V[:, r] = torch.cholesky_solve(rest[:, None], root)[:, 0]
        seen[:, r] = V[:, r] @ metrics
    return V


def _ridged(systems: Tensor) -> Tensor:
    """Return systems (..., q, q) that can be solved, the same but for rounding where they could."""
    mean = systems.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, 1)
    equal = torch.eye(systems.shape[-1], dtype=systems.dtype, device=systems.device)
    return systems + _RIDGE * mean[..., None, None] * equal


def _unit(columns: Tensor) -> Tensor:
    """Scale columns to unit norm; one of zero stays."""
    norms = columns.norm(dim=0)
    return columns / torch.where(norms > 0, norms, 1)
