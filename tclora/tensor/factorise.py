"""Joint CP factorisation of adapters, module by module, without ever forming a dense update.

Symbols: K adapters, d_out × d_in a module, r_k the LoRA ranks, R the CP rank.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch

from tclora.adapter import Adapter
from tclora.adapter.union import check_adapters, module_factors, module_names
from tclora.tensor.als import CPSolution
from tclora.tensor.compress import Core, compress
from tclora.tensor.cp import cp_als, cp_exact, extended, stack_norm
from tclora.tensor.library import CPFactors, LibraryFactors

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# Bytes of orthonormal bases held at a time: what bounds memory on large models.
_BATCH_BYTES = 256 << 20


def factorise(
    adapters: Sequence[Adapter],
    rank: int | Mapping[str, int],
    *,
    n_starts: int = 4,
    n_iter: int = 100,
    tol: float = 1e-5,
    seed: int = 0,
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
    progress : callable, optional
        Called with (modules done, modules in all).

    Returns
    -------
    LibraryFactors

    Raises
    ------
    ValueError
        If `rank` is below 1.
    AdapterError
        If there is no adapter, names repeat, shapes disagree, or a factor is not finite.
    """
    check_adapters(adapters)
    names = module_names(adapters)
    ranks = _rank_of_each(names, rank)
    found: dict[str, CPFactors] = {}
    clamped = 0
    for modules, cores, bound in _batches(adapters, names, ranks):
        used = min(ranks[modules[0]], bound)
        clamped += len(modules) * (used < ranks[modules[0]])
        B, A = torch.stack([c.B for c in cores]), torch.stack([c.A for c in cores])
        if used == bound:
            solution = cp_exact(B, A, used)
        else:
            solution = cp_als(B, A, used, n_starts=n_starts, n_iter=n_iter, tol=tol, seed=seed)
        found.update(_expand(modules, cores, solution))
        if progress:
            progress(len(found), len(names))
    if clamped:
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
) -> pd.DataFrame:
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
    rows: list[tuple[str, int, float, float]] = []
    done = 0
    for modules, cores, bound in _batches(adapters, names):
        B, A = torch.stack([c.B for c in cores]), torch.stack([c.A for c in cores])
        energy = stack_norm(B, A).square().tolist()
        start = None
        for rank in ascending:
            error = [0.0] * len(modules)
            if rank < bound:
                solution = cp_als(
                    B, A, rank, n_starts=n_starts, n_iter=n_iter, tol=tol, seed=seed, start=start
                )
                error = solution.error.tolist()
                following = next((r for r in ascending if r > rank), rank)
                start = extended(B, A, solution, min(following, bound))
            rows += [
                (m, rank, 1 - e * e, w) for m, e, w in zip(modules, error, energy, strict=True)
            ]
        done += len(modules)
        if progress:
            progress(done, len(names))
    return _with_overall(rows)


def smallest_ranks(curve: pd.DataFrame, explained_variance: float) -> dict[str, int]:
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


def _batches(
    adapters: Sequence[Adapter], names: Sequence[str], ranks: Mapping[str, int] | None = None
) -> Iterator[tuple[list[str], list[Core], int]]:
    """Compress modules and yield them grouped by core shape, total rank Σ r_k and CP rank."""
    groups: dict[tuple[object, ...], tuple[list[str], list[Core], int]] = {}
    held = 0
    for module in names:
        factors = module_factors(adapters, module)
        core = compress([f.B for f in factors], [f.A for f in factors])
        bound = sum(min(f.rank, *f.shape) for f in factors)
        key = (core.B.shape, core.A.shape, bound, ranks[module] if ranks else None)
        modules, cores, _ = groups.setdefault(key, ([], [], bound))
        modules.append(module)
        cores.append(core)
        held += core.left.nbytes + core.right.nbytes
        if held > _BATCH_BYTES:
            yield from groups.values()
            groups, held = {}, 0
    yield from groups.values()


def _expand(
    modules: Sequence[str], cores: Sequence[Core], solution: CPSolution
) -> Iterator[tuple[str, CPFactors]]:
    """Leave the compressed bases: U = Q_B Ũ, V = Q_A Ṽ."""
    for i, (module, core) in enumerate(zip(modules, cores, strict=True)):
        U, V = core.left @ solution.U[i], core.right @ solution.V[i]
        energy = float(stack_norm(core.B[None], core.A[None]).square())
        fit = 1 - float(solution.error[i]) ** 2
        yield module, CPFactors(U, V, solution.C[i], fit, energy)


def _with_overall(rows: Sequence[tuple[str, int, float, float]]) -> pd.DataFrame:
    """Sort rows (module, rank, explained variance, energy) and add the energy-weighted total."""
    frame = pd.DataFrame(rows, columns=["module", "rank", "explained_variance", "energy"])
    frame = frame.sort_values(["module", "rank"], ignore_index=True)
    lost = (1 - frame["explained_variance"]) * frame["energy"]
    totals = pd.DataFrame({"lost": lost, "energy": frame["energy"]}).groupby(frame["rank"]).sum()
    share = (totals["lost"] / totals["energy"].where(totals["energy"] > 0)).fillna(0.0)
    overall = pd.DataFrame(
        {"module": "overall", "rank": totals.index, "explained_variance": 1 - share.to_numpy()}
    )
    return pd.concat([frame.drop(columns="energy"), overall], ignore_index=True)
