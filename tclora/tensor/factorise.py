"""Joint CP factorisation of adapters, module by module, without ever forming a dense update.

Symbols: K adapters, d_out × d_in a module, r_k the LoRA ranks, R the CP rank.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from tclora.adapter import Adapter
from tclora.adapter.union import check_adapters, module_factors, module_names
from tclora.tensor.als import CPSolution
from tclora.tensor.compress import Core, compress
from tclora.tensor.cp import cp_als, cp_exact, extended, normalised, stack_norm
from tclora.tensor.library import CPFactors, LibraryFactors
from tclora.tensor.reference import cp_parafac
from tclora.tensor.sidebyside import side_by_side

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Solver = Literal["als", "tensorly"]
_Solve = Callable[..., CPSolution]
_Point = tuple[str, int, float, float]  # module, rank, explained variance, energy

# Bytes of orthonormal bases held at a time: what bounds memory on large models.
_HELD_BYTES = 256 << 20
# Bytes of cores solved in one batch: large enough to outweigh the calls, small enough for caches.
_BATCH_BYTES = 2 << 20


class _Batch(NamedTuple):
    """Modules whose cores have one shape and one total rank."""

    modules: list[str]
    cores: list[Core]
    bound: int

    def stacks(self) -> tuple[Tensor, Tensor]:
        """Return B (M, K, m, r) and A (M, K, r, n) of all cores."""
        return torch.stack([c.B for c in self.cores]), torch.stack([c.A for c in self.cores])


def factorise(
    adapters: Sequence[Adapter],
    rank: int | Mapping[str, int],
    *,
    n_starts: int = 4,
    n_iter: int = 100,
    tol: float = 1e-5,
    seed: int = 0,
    solver: Solver = "als",
    normalise: bool = False,
    progress: Progress | None = None,
) -> LibraryFactors:
    """Factorise the adapters' updates jointly, Δ_k ≈ U diag(C[k]) Vᵀ per module.

    Parameters
    ----------
    adapters : sequence of K Adapter
        With distinct names and one base model; a module that an adapter lacks counts as zero.
    rank : int, or mapping from module path to int
        CP rank R of all modules, or of each. Where it exceeds a module's Σ r_k it is clamped to it,
        which is exact.
    n_starts, n_iter, tol, seed
        See `cp_als`.
    solver : {"als", "tensorly"}
        Ours, or TensorLy's ``parafac`` on the same cores as a reference; see `cp_parafac`.
    normalise : bool
        Fit all adapters at norm 1 in every module and scale back: a small one counts as much as a
        large one. The total explained variance is lower, that of small adapters higher.
    progress : callable, optional
        Called with (modules done, modules in all).

    Returns
    -------
    LibraryFactors

    Raises
    ------
    ValueError
        If `rank` is below 1 or `solver` is unknown.
    AdapterError
        If there is no adapter, names repeat, shapes disagree, or a factor is not finite.
    """
    check_adapters(adapters)
    names = module_names(adapters)
    ranks = _rank_of_each(names, rank)
    solve: _Solve = partial(_solver(solver), n_starts=n_starts, n_iter=n_iter, tol=tol, seed=seed)
    if normalise:
        solve = partial(normalised, solve=solve)
    found: dict[str, CPFactors] = {}
    batches = _batches(adapters, names, ranks)
    for factors in side_by_side(partial(_factors, ranks=ranks, solve=solve), batches):
        found.update(factors)
        if progress:
            progress(len(found), len(names))
    if clamped := sum(cp.rank < ranks[module] for module, cp in found.items()):
        logger.warning(
            "the CP rank exceeds the adapters' total rank in %d of %d modules; "
            "the total rank, which is exact, is used there",
            clamped, len(names),
        )  # fmt: skip
    return LibraryFactors(
        names=tuple(adapter.name for adapter in adapters),
        rank=max(ranks.values()),
        modules=dict(sorted(found.items())),
        base_model=adapters[0].base_model,
    )


def explained_variance_curve(
    adapters: Sequence[Adapter],
    ranks: Sequence[int],
    *,
    n_starts: int = 1,
    n_iter: int = 50,
    tol: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """Measure how much of the adapters' energy joint factors keep at each CP rank.

    Parameters
    ----------
    adapters : sequence of K Adapter
    ranks : sequence of int
        CP ranks R; each distinct one is solved once, in ascending order.
    n_starts, n_iter, tol, seed
        See `cp_als`; every rank also starts from the factors of the rank before it.
    progress : callable, optional
        Called with (modules done, modules in all).

    Returns
    -------
    DataFrame
        Columns module, rank, explained_variance (fraction 0–1, non-decreasing in rank); the rows
        of module "overall" weigh modules by their energy.
    """
    check_adapters(adapters)
    names = module_names(adapters)
    ascending = sorted(set(ranks))
    if not ascending or ascending[0] < 1:
        raise ValueError(f"ranks must be at least one number, each at least 1, got {list(ranks)}")
    solve = partial(cp_als, n_starts=n_starts, n_iter=n_iter, tol=tol, seed=seed)
    rows: list[_Point] = []
    batches = _batches(adapters, names)
    for points in side_by_side(partial(_curves, ranks=ascending, solve=solve), batches):
        rows += points
        if progress:
            progress(len(rows) // len(ascending), len(names))
    return _with_overall(rows)


def smallest_ranks(curve: "pd.DataFrame", explained_variance: float) -> dict[str, int]:
    """Choose CP ranks by the explained variance they reach.

    Parameters
    ----------
    curve : DataFrame
        From `explained_variance_curve`.
    explained_variance : float
        What must be reached (fraction 0–1).

    Returns
    -------
    dict
        Module path → the smallest rank measured that reaches it in this module; "overall" → the
        smallest one that reaches it over all modules. Without "overall" it is what `factorise`
        takes as ranks of each module.

    Raises
    ------
    ValueError
        If a module does not reach it at any rank.
    """
    reached = curve[curve["explained_variance"] >= explained_variance]
    ranks = reached.groupby("module")["rank"].min()
    if missing := sorted(set(curve["module"]) - set(ranks.index)):
        raise ValueError(
            f"explained_variance must be reached at a rank of the curve, got {explained_variance}, "
            f"which {missing[0]} does not reach at {curve['rank'].max()}; measure larger ranks"
        )
    return {str(module): int(rank) for module, rank in ranks.items()}


def _rank_of_each(names: Sequence[str], rank: int | Mapping[str, int]) -> dict[str, int]:
    ranks = dict.fromkeys(names, rank) if isinstance(rank, int) else dict(rank)
    if missing := [name for name in names if name not in ranks]:
        raise ValueError(f"rank must be given for every module, got none for {missing[0]}")
    if min(ranks.values()) < 1:
        raise ValueError(f"rank must be at least 1, got {min(ranks.values())}")
    return ranks


def _solver(name: Solver) -> _Solve:
    solvers: dict[str, _Solve] = {"als": cp_als, "tensorly": cp_parafac}
    if name not in solvers:
        raise ValueError(f"solver must be one of {', '.join(solvers)}, got {name!r}")
    return solvers[name]


def _batches(
    adapters: Sequence[Adapter], names: Sequence[str], ranks: Mapping[str, int] | None = None
) -> Iterator[_Batch]:
    """Compress modules and yield them in batches of one core shape, total rank and CP rank."""
    groups: dict[tuple[object, ...], _Batch] = {}
    held = 0
    compressed = side_by_side(partial(_compressed, adapters), names)
    for module, (core, bound) in zip(names, compressed, strict=True):
        key = (core.B.shape, core.A.shape, bound, ranks[module] if ranks else None)
        batch = groups.setdefault(key, _Batch([], [], bound))
        batch.modules.append(module)
        batch.cores.append(core)
        held += core.left.nbytes + core.right.nbytes
        if len(batch.cores) * (core.B.nbytes + core.A.nbytes) > _BATCH_BYTES:
            yield groups.pop(key)
            held -= len(batch.cores) * (core.left.nbytes + core.right.nbytes)
        if held > _HELD_BYTES:
            yield from groups.values()
            groups, held = {}, 0
    yield from groups.values()


def _compressed(adapters: Sequence[Adapter], module: str) -> tuple[Core, int]:
    """Return a module's core and its total rank Σ r_k."""
    factors = module_factors(adapters, module)
    core = compress([f.B for f in factors], [f.A for f in factors])
    return core, sum(min(f.rank, *f.shape) for f in factors)


def _factors(batch: _Batch, *, ranks: Mapping[str, int], solve: _Solve) -> dict[str, CPFactors]:
    """Factorise a batch at the rank asked for, or exactly at its total rank."""
    B, A = batch.stacks()
    rank = ranks[batch.modules[0]]
    solution = cp_exact(B, A, batch.bound) if rank >= batch.bound else solve(B, A, rank)
    return dict(_expand(batch.modules, batch.cores, solution))


def _curves(batch: _Batch, *, ranks: Sequence[int], solve: _Solve) -> list[_Point]:
    """Measure the fit of a batch at ascending ranks, each one started from the one before."""
    B, A = batch.stacks()
    energy = stack_norm(B, A).square().tolist()
    points: list[_Point] = []
    start = None
    for rank, following in zip(ranks, [*ranks[1:], ranks[-1]], strict=True):
        error = [0.0] * len(batch.modules)
        if rank < batch.bound:
            solution = solve(B, A, rank, start=start)
            error = solution.error.tolist()
            start = extended(B, A, solution, min(following, batch.bound))
        rows = zip(batch.modules, error, energy, strict=True)
        points += [(module, rank, 1 - e * e, weight) for module, e, weight in rows]
    return points


def _expand(
    modules: Sequence[str], cores: Sequence[Core], solution: CPSolution
) -> Iterator[tuple[str, CPFactors]]:
    """Leave the compressed bases: U = Q_B Ũ, V = Q_A Ṽ."""
    for i, (module, core) in enumerate(zip(modules, cores, strict=True)):
        U, V = core.left @ solution.U[i], core.right @ solution.V[i]
        energy = float(stack_norm(core.B[None], core.A[None]).square())
        fit = 1 - float(solution.error[i]) ** 2
        yield module, CPFactors(U, V, solution.C[i], fit, energy)


def _with_overall(rows: Sequence[_Point]) -> "pd.DataFrame":
    """Sort rows (module, rank, explained variance, energy) and add the energy-weighted total."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["module", "rank", "explained_variance", "energy"])
    frame = frame.sort_values(["module", "rank"], ignore_index=True)
    lost = (1 - frame["explained_variance"]) * frame["energy"]
    totals = pd.DataFrame({"lost": lost, "energy": frame["energy"]}).groupby(frame["rank"]).sum()
    share = (totals["lost"] / totals["energy"].where(totals["energy"] > 0)).fillna(0.0)
    overall = pd.DataFrame(
        {"module": "overall", "rank": totals.index, "explained_variance": 1 - share.to_numpy()}
    )
    return pd.concat([frame.drop(columns="energy"), overall], ignore_index=True)
