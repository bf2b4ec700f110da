"""Batched CP decomposition of compressed adapter stacks: starts, screening, conventions.

Symbols: M modules in the batch, K adapters, m × n the core, r the LoRA rank, R the CP rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tclora.tensor.als import CPSolution, Stack, begin, descend, unit_columns, where
from tclora.tensor.starts import fill, gaussian, mean, slice_components, slices, unfoldings

# Share of the sweeps that every start gets; then only each module's best ones go on.
_SCREENING = 0.3
_FINALISTS = 2
# A grown start: steps to the full rank, and sweeps at each of them.
_STEPS, _STEP_SWEEPS = 4, 20


def cp_als(
    B: Tensor,
    A: Tensor,
    rank: int,
    *,
    n_starts: int = 4,
    n_iter: int = 100,
    tol: float = 1e-5,
    seed: int = 0,
    start: tuple[Tensor, Tensor] | None = None,
    accelerate: bool = True,
) -> CPSolution:
    """Fit a CP model of rank R to each stack of a batch, keeping each module's best start.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
        Output factors of the cores, in the type to compute in.
    A : Tensor, shape (M, K, r, n)
        Input factors of the cores.
    rank : int
        CP rank R, at least 1; may exceed m, n and K r.
    n_starts : int
        Starting points tried: deterministic ones first, then random ones.
    n_iter : int
        Sweeps at most of a start that goes the whole way.
    tol : float
        A module stops when its relative error fell by less than `tol` of itself in one sweep.
    seed : int
        Seed of the random starts.
    start : (Tensor, Tensor), optional
        Factor matrices (M, m, R) and (M, n, R) of one more start, tried first.
    accelerate : bool
        Extrapolate between sweeps; without, the sweeps are plain alternating least squares, as in
        TensorLy's ``parafac``.

    Returns
    -------
    CPSolution

    Raises
    ------
    ValueError
        If there is nothing to start from.

    Notes
    -----
    Starts, in order: the strongest singular pairs among all slices; a model grown in steps, each
    time by the strongest pairs in the slices of its residual; the same from a converged model of
    half the rank; leading vectors of the two unfoldings; singular pairs of the sum of the slices;
    Gaussian matrices. After a part of the sweeps only each module's best two go on. One sweep costs
    O(M K (m + n) r R + M (m + n) R²).

    Between sweeps the iterate is extrapolated along its last change, by a step that grows while the
    fit improves and is withdrawn when it does not, so that the fit never decreases. Each solve
    carries a proximal term, which keeps it well-posed where components become collinear.
    """
    if n_starts < 1 and start is None:
        raise ValueError(f"n_starts must be at least 1 without a start, got {n_starts}")
    scale = stack_norm(B, A)
    stack = Stack(B / torch.where(scale > 0, scale, 1)[:, None, None, None], A)
    run = partial(descend, stack, tol=tol, accelerate=accelerate)
    starts = [] if start is None else [start]
    starts += _starts(stack, rank, n_starts, partial(descend, n_iter=n_iter, tol=tol), seed)
    tried = [begin(stack, U, V) for U, V in starts]
    if len(tried) > _FINALISTS:
        screening = round(_SCREENING * n_iter)
        tried = best_of([run(one, n_iter=screening) for one in tried], _FINALISTS)
        n_iter -= screening
    (best,) = best_of([run(one, n_iter=n_iter) for one in tried], 1)
    error = torch.where(scale > 0, best.error, 0.0)
    return ordered(CPSolution(best.U, best.V, best.C * scale[:, None, None], error))


def cp_exact(B: Tensor, A: Tensor, rank: int) -> CPSolution:
    """Return a CP model of rank R = Σ r_k (or more) that reproduces each stack, without iterating.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
    A : Tensor, shape (M, K, r, n)
    rank : int
        CP rank, at least the total rank of the slices; surplus components are left out.
    """
    U, V, C = slice_components(B, A, rank)
    return ordered(CPSolution(U, V, C, B.new_zeros(B.shape[0])))


def extended(
    B: Tensor, A: Tensor, model: CPSolution, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return a start of a larger CP rank: a model and the strongest parts of its residual.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
    A : Tensor, shape (M, K, r, n)
    model : CPSolution
        A CP model of a rank below `rank`.
    rank : int
        CP rank R of the start.
    generator : torch.Generator, optional
        Source of columns that the residual lacks.

    Returns
    -------
    U, V : Tensor
        Shapes (M, m, R) and (M, n, R).
    """
    rest_B, rest_A = residual(B, A, model)
    U, V, _ = slice_components(rest_B, rest_A, rank - model.U.shape[2])
    generator = generator or torch.Generator().manual_seed(0)
    return (
        fill(torch.cat([model.U, U], dim=2), rank, generator),
        fill(torch.cat([model.V, V], dim=2), rank, generator),
    )


def stack_norm(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖𝒳‖ per module, shape (M,), of stacks B (M, K, m, r) @ A (M, K, r, n)."""
    return slice_energies(B, A).sum(1).sqrt()


def slice_energies(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖𝒳[k]‖² per module and adapter, shape (M, K), of stacks as in `stack_norm`."""
    return ((B.mT @ B) * (A @ A.mT)).sum((2, 3)).clamp_min(0)


def residual(B: Tensor, A: Tensor, model: CPSolution) -> tuple[Tensor, Tensor]:
    """Return the factors, ranks r + R, of stacks B (M, K, m, r) @ A (M, K, r, n) minus a model."""
    rest_B = torch.cat([B, -model.U[:, None] * model.C[:, :, None]], dim=3)
    rest_A = torch.cat([A, model.V.mT[:, None].expand(-1, B.shape[1], -1, -1)], dim=2)
    return rest_B, rest_A


def normalised(B: Tensor, A: Tensor, rank: int, *, solve: Callable[..., CPSolution]) -> CPSolution:
    """Solve with every adapter of a module at norm 1, and scale the loadings back.

    Parameters
    ----------
    B, A : Tensor
        As in `cp_als`.
    rank : int
        CP rank R.
    solve : callable
        Takes B, A and R.

    Returns
    -------
    CPSolution
        Of the stacks as they are; its error, relative to them, is not what was minimised.
    """
    norms = slice_energies(B, A).sqrt()  # (M, K)
    norms = torch.where(norms > 0, norms, 1)
    found = solve(B / norms[:, :, None, None], A, rank)
    model = replace(found, C=found.C * norms[:, :, None])
    scale = stack_norm(B, A)
    error = stack_norm(*residual(B, A, model)) / torch.where(scale > 0, scale, 1)
    return ordered(replace(model, error=error))


def _starts(
    stack: Stack, rank: int, count: int, solve: Callable[..., CPSolution], seed: int
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    makers: list[Callable[[], tuple[Tensor, Tensor]]] = [
        partial(slices, stack.B, stack.A, rank, generator),
        partial(_grown, stack, rank, generator),
        partial(_doubled, stack, rank, solve, generator),
        partial(unfoldings, stack.B, stack.A, rank, generator),
        partial(mean, stack.B, stack.A, rank, generator),
    ]
    makers += [partial(gaussian, stack.B, stack.A, rank, generator)] * (count - len(makers))
    return [maker() for maker in makers[:count]]


def _grown(stack: Stack, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grow a model to rank R in equal steps of the rank, a few sweeps at each."""
    ranks = sorted({-(-rank * step // _STEPS) for step in range(1, _STEPS + 1)})
    U, V = slices(stack.B, stack.A, ranks[0], generator)
    for following in ranks[1:]:
        model = descend(stack, begin(stack, U, V), _STEP_SWEEPS, tol=0)
        U, V = extended(stack.B, stack.A, model, following, generator)
    return U, V


def _doubled(
    stack: Stack, rank: int, solve: Callable[..., CPSolution], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Extend a converged model of half the rank."""
    U, V = slices(stack.B, stack.A, -(-rank // 2), generator)
    return extended(stack.B, stack.A, solve(stack, begin(stack, U, V)), rank, generator)


def best_of(tried: Sequence[CPSolution], count: int) -> list[CPSolution]:
    """Return each module's `count` best solutions, the best one first."""
    left = list(tried)
    chosen = []
    for _ in range(count):
        best = left[0]
        for i, one in enumerate(left[1:], start=1):
            better = one.error < best.error
            best, left[i] = where(better, one, best), where(better, best, one)
        chosen.append(best)
        left = left[1:]
    return chosen


def conventional(U: Tensor, V: Tensor, C: Tensor) -> CPSolution:
    """Bring U (M, m, R), V (M, n, R), C (M, K, R) to our conventions; the error is not known."""
    U, V, C = unit_columns(U, V, C)
    return ordered(CPSolution(U, V, C, C.new_full(C.shape[:1], torch.nan)))


def ordered(solution: CPSolution) -> CPSolution:
    """Sort components by energy and make each one's loadings sum to a non-negative number."""
    order = solution.C.norm(dim=1).argsort(dim=1, descending=True, stable=True)[
        :, None
    ]  # (M, 1, R)
    U, V, C = (x.gather(2, order.expand_as(x)) for x in (solution.U, solution.V, solution.C))
    sign = torch.where(C.sum(1, keepdim=True) < 0, -1.0, 1.0).to(C)
    return CPSolution(U * sign, V, C * sign, solution.error)
