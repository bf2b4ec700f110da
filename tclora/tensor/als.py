"""Alternating least squares with extrapolation for a batch of CP problems, from given starts.

A stack is given by its factors, 𝒳[k] = B[k] A[k], and is never multiplied out: every product with
it runs through the rank-r bottleneck.

Symbols: M modules in the batch, K adapters, m × n the core, r the LoRA rank, R the CP rank;
𝒳[k] ≈ U diag(C[k]) Vᵀ with U (m, R), V (n, R), C (K, R).

References
----------
Kolda, Bader (2009), "Tensor Decompositions and Applications", SIAM Review 51(3).
Mitchell, Ye, De Sterck (2020), "Nesterov acceleration of alternating least squares for canonical
tensor decomposition: Momentum step size and restart mechanisms", Numer. Linear Algebra Appl. 27(4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Weight of the proximal term that keeps each least-squares step well-posed, relative to its matrix.
# It pulls towards the previous iterate, not towards zero, so the fit still never decreases.
_PROXIMAL = 1e-9
_TINY = 1e-30
# Sweeps between two looks at which modules have converged.
_CHECK_EVERY = 5
# Extrapolation between sweeps: first and greatest length, its change on success and on failure.
_FIRST_STEP, _LONGEST = 0.5, 4.0
_GROWTH, _SHRINK = 1.15, 0.5


@dataclass(frozen=True)
class CPSolution:
    """CP factors of a batch of cores.

    Attributes
    ----------
    U : Tensor, shape (M, m, R)
        Output factors, unit-norm columns.
    V : Tensor, shape (M, n, R)
        Input factors, unit-norm columns.
    C : Tensor, shape (M, K, R)
        Loadings, which hold all scale; their sum over adapters is non-negative.
    error : Tensor, shape (M,)
        ‖𝒳 − fit‖ / ‖𝒳‖, 0 where 𝒳 = 0.
    """

    U: Tensor
    V: Tensor
    C: Tensor
    error: Tensor

    def at(self, index: Tensor) -> "CPSolution":
        """Return the solutions of some modules of the batch."""
        return CPSolution(self.U[index], self.V[index], self.C[index], self.error[index])


class Stack:
    """A batch of stacks 𝒳[k] = B[k] A[k] and its products with factor matrices.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
    A : Tensor, shape (M, K, r, n)
        Scaled so that ‖𝒳‖ = 1 in every module (or 0).
    """

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self.B, self.A = B, A
        self._columns = B.transpose(1, 2).flatten(2)  # (M, m, K r)
        self._rows = A.flatten(1, 2)  # (M, K r, n)

    def at(self, index: Tensor) -> "Stack":
        """Return the stacks of some modules of the batch."""
        return Stack(self.B[index], self.A[index])

    def left(self, U: Tensor) -> Tensor:
        """B[k]ᵀ U, shape (M, K, r, R)."""
        products: Tensor = (self._columns.mT @ U).unflatten(1, self.A.shape[1:3])
        return products

    def right(self, V: Tensor) -> Tensor:
        """A[k] V, shape (M, K, r, R)."""
        products: Tensor = (self._rows @ V).unflatten(1, self.A.shape[1:3])
        return products

    def mttkrp_u(self, right: Tensor, C: Tensor) -> Tensor:
        """Σ_k 𝒳[k] V diag(C[k]), shape (M, m, R)."""
        return self._columns @ (right * C[:, :, None]).flatten(1, 2)

    def mttkrp_v(self, left: Tensor, C: Tensor) -> Tensor:
        """Σ_k 𝒳[k]ᵀ U diag(C[k]), shape (M, n, R)."""
        return self._rows.mT @ (left * C[:, :, None]).flatten(1, 2)


@dataclass(frozen=True)
class _State:
    """Where the descent stands: its best iterate and the extrapolated point to sweep from."""

    best: CPSolution
    point: CPSolution
    step: Tensor  # (M,) extrapolation length
    rejected: Tensor  # (M,) whether the last sweep made the fit worse

    def at(self, index: Tensor) -> "_State":
        return _State(
            self.best.at(index), self.point.at(index), self.step[index], self.rejected[index]
        )


def descend(
    stack: Stack, start: CPSolution, n_iter: int, tol: float, accelerate: bool = True
) -> CPSolution:
    """Sweep from a start until every module has converged or `n_iter` is reached.

    A module has converged when its relative error fell by less than `tol` of itself in one sweep.
    Without acceleration the sweeps are plain alternating least squares.
    """
    best = start
    active = torch.arange(start.U.shape[0], device=start.U.device)
    step = torch.full_like(best.error, _FIRST_STEP if accelerate else 0.0)
    state = _State(best, best, step, rejected=torch.zeros_like(step, dtype=torch.bool))
    for sweep in range(1, n_iter + 1):
        before = state.best.error
        state = _advance(state, _sweep(stack, state.point))
        if sweep % _CHECK_EVERY and sweep < n_iter:
            continue
        best = _scatter(best, active, state.best)
        moving = (before - state.best.error > tol * before) | state.rejected
        if not moving.any():
            break
        if not moving.all():
            kept = moving.nonzero()[:, 0]
            stack, active, state = stack.at(kept), active[kept], state.at(kept)
    return best


def _advance(state: _State, new: CPSolution) -> _State:
    """Accept the iterate where it is better and extrapolate; go back to the best elsewhere."""
    rejected = new.error > state.best.error
    best = where(rejected, state.best, new)
    step = torch.where(rejected, state.step * _SHRINK, (state.step * _GROWTH).clamp_max(_LONGEST))
    length = torch.where(rejected, 0.0, step)[:, None, None]
    U, V, C = (
        now + length * (now - then)
        for now, then in ((best.U, state.best.U), (best.V, state.best.V), (best.C, state.best.C))
    )
    point = CPSolution(U, V, C, best.error)
    return _State(best, point, step, rejected)


def _sweep(stack: Stack, point: CPSolution) -> CPSolution:
    """Update U, then V, then C by least squares, each with the others fixed."""
    U, V, C = point.U, point.V, point.C
    U = _solve((V.mT @ V) * (C.mT @ C), stack.mttkrp_u(stack.right(V), C), U)
    U, length = _unit(U)
    C = C * length
    V = _solve((U.mT @ U) * (C.mT @ C), stack.mttkrp_v(stack.left(U), C), V)
    V, length = _unit(V)
    return _with_loadings(stack, U, V, C * length)


def begin(stack: Stack, U: Tensor, V: Tensor) -> CPSolution:
    """Return the best model with the directions of U (M, m, R) and V (M, n, R)."""
    return _with_loadings(stack, _unit(U)[0], _unit(V)[0], None)


def _with_loadings(stack: Stack, U: Tensor, V: Tensor, C: Tensor | None) -> CPSolution:
    """Solve for the loadings and measure the error of the result (‖𝒳‖ = 1)."""
    products = (stack.left(U) * stack.right(V)).sum(2)  # (M, K, R)
    gram = (U.mT @ U) * (V.mT @ V)  # (M, R, R)
    C = _solve(gram, products, torch.zeros_like(products) if C is None else C)
    return CPSolution(U, V, C, _error(C, products, gram))


def measured(stack: Stack, U: Tensor, V: Tensor, C: Tensor) -> CPSolution:
    """Return a model with unit-norm U and V columns, all scale in C, and its error (‖𝒳‖ = 1)."""
    U, V, C = unit_columns(U, V, C)
    products = (stack.left(U) * stack.right(V)).sum(2)
    return CPSolution(U, V, C, _error(C, products, (U.mT @ U) * (V.mT @ V)))


def _error(C: Tensor, products: Tensor, gram: Tensor) -> Tensor:
    squared = 1 - 2 * (products * C).sum((1, 2)) + (gram * (C.mT @ C)).sum((1, 2))
    return squared.clamp_min(0).sqrt()


def _solve(gram: Tensor, target: Tensor, previous: Tensor) -> Tensor:
    """Solve X gram = target for X, held near `previous` where gram is close to singular."""
    weight = _PROXIMAL * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + _TINY
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + weight * identity)
    return torch.cholesky_solve((target + weight * previous).mT, factor).mT


def unit_columns(U: Tensor, V: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the scale of U (M, m, R) and V (M, n, R) into C (M, K, R)."""
    (U, long), (V, wide) = _unit(U), _unit(V)
    return U, V, C * long * wide


def _unit(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Scale columns (M, d, R) to unit norm; return them and their norms (M, 1, R)."""
    norms = columns.norm(dim=1, keepdim=True)
    return columns / norms.clamp_min(_TINY), norms


def where(mask: Tensor, one: CPSolution, other: CPSolution) -> CPSolution:
    """Take `one` for the modules in the mask (M,), `other` for the rest."""
    wide = mask[:, None, None]
    return CPSolution(
        torch.where(wide, one.U, other.U),
        torch.where(wide, one.V, other.V),
        torch.where(wide, one.C, other.C),
        torch.where(mask, one.error, other.error),
    )


def _scatter(whole: CPSolution, index: Tensor, part: CPSolution) -> CPSolution:
    """Replace some modules' solutions."""
    return CPSolution(
        whole.U.index_copy(0, index, part.U),
        whole.V.index_copy(0, index, part.V),
        whole.C.index_copy(0, index, part.C),
        whole.error.index_copy(0, index, part.error),
    )
