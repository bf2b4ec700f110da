"""The smallest CP rank at which the routed library keeps a wanted share of what adapters gained.

Symbols: K clusters, R the CP rank; recovery is (base − routed) / (base − own) in response NLL.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from tclora.activations import ActivationStatistics
from tclora.adapter import Adapter
from tclora.adapter.union import module_names
from tclora.config import SolverConfig
from tclora.errors import LibraryError
from tclora.files import write_json
from tclora.jobs.call import EventCallback
from tclora.merge import merge
from tclora.merge.inputs import MergeInputs
from tclora.model.base import Base
from tclora.model.cluster_loss import TOKEN_BUDGET, ClusterLoss
from tclora.model.sample import Sample
from tclora.model.tokens import TokenRow
from tclora.route.gates import fit_gates
from tclora.tensor import factorise


@dataclass(frozen=True)
class RankSearch:
    """The outcome of a search.

    Attributes
    ----------
    rank : int
        The smallest rank tried that reaches the target; the largest one if none does.
    reached : bool
        Whether the target was reached.
    curve : Mapping[int, float]
        Rank → mean recovery, for every rank tried, in rising order.
    """

    rank: int
    reached: bool
    curve: Mapping[int, float]


def smallest_rank(
    recovery: Callable[[int], float], target: float, low: int, high: int, step: int = 1
) -> RankSearch:
    """Find the smallest rank that reaches a target, by doubling and then halving the gap.

    Parameters
    ----------
    recovery : callable
        Rank → recovery (fraction), taken to grow with the rank.
    target : float
        Recovery to reach (fraction).
    low, high : int
        Smallest and largest rank to try.
    step : int
        The answer is this exact.

    Returns
    -------
    RankSearch

    Raises
    ------
    ValueError
        Unless 1 ≤ low ≤ high and step ≥ 1.
    """
    if not 1 <= low <= high or step < 1:
        raise ValueError(
            f"low, high, step must obey 1 ≤ low ≤ high, step ≥ 1, got {low}, {high}, {step}"
        )
    curve: dict[int, float] = {}

    def reaches(rank: int) -> bool:
        curve[rank] = recovery(rank)
        return curve[rank] >= target

    below, rank = 0, low
    while not reaches(rank) and rank < high:
        below, rank = rank, min(2 * rank, high)
    reached = curve[rank] >= target
    while reached and below and rank - below > step:
        middle = (below + rank) // 2
        below, rank = (below, middle) if reaches(middle) else (middle, rank)
    return RankSearch(rank, reached, dict(sorted(curve.items())))


def find_rank(
    recovery: Callable[[int], float], adapters: Sequence[Adapter], target: float
) -> RankSearch:
    """Search from half the largest LoRA rank r to K r, exact to r / 8; see `smallest_rank`."""
    r = max(factors.rank for adapter in adapters for factors in adapter.modules.values())
    return smallest_rank(recovery, target, max(1, r // 2), len(adapters) * r, step=max(1, r // 8))


class RoutedRecovery:
    """Mean recovery of a routed library on each cluster's own rows, by rank.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    adapters : sequence of K Adapter
        The clusters' own adapters.
    rows : Mapping[str, sequence of TokenRow]
        Adapter name → rows of its cluster to measure on.
    method : str
        The merge whose factors are gated.
    statistics : ActivationStatistics, optional
        For methods that use them, and for the gates.
    solver : SolverConfig, optional
        Effort of the factorisation, for methods on CP factors.
    seed : int
        Seed of factorisation and merge.
    token_budget : int
        Positions per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Sequence[Adapter],
        rows: Mapping[str, Sequence[TokenRow]],
        *,
        method: str = "tc-lora",
        statistics: ActivationStatistics | None = None,
        solver: SolverConfig | None = None,
        seed: int = 0,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        self._factorise = partial(factorise, adapters, **dict(solver or SolverConfig()), seed=seed)
        self._loss = ClusterLoss(model, rows, module_names(adapters), token_budget=token_budget)
        self._adapters = adapters
        self._method = method
        self._statistics = statistics
        self._seed = seed
        self._base = {a.name: self._loss.of(a.name, None) for a in adapters}
        self._own = {a.name: self._loss.of(a.name, a) for a in adapters}

    def __call__(self, rank: int) -> float:
        """Return the mean recovery over the clusters whose own adapter beats the base."""
        merged = merge(
            self._adapters,
            self._method,
            rank=rank,
            factors=partial(self._factorise, rank),
            statistics=self._statistics,
            seed=self._seed,
        )
        gated = fit_gates(self._adapters, merged.adapter, self._statistics)
        shares = [
            (self._base[name] - self._loss.of(name, gated.cluster(name)))
            / (self._base[name] - self._own[name])
            for name in gated.names
            if self._base[name] > self._own[name]
        ]
        if not shares:
            raise LibraryError(
                "factorise.target_recovery is not defined: no adapter beats the base model on rows "
                "of its own cluster; train longer, or set factorise.rank"
            )
        return sum(shares) / len(shares)


def choose_rank(
    *,
    base: Base,
    sample: Sample,
    given: MergeInputs,
    method: str,
    solver: SolverConfig,
    recovery: float,
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> RankSearch:
    """Find the smallest CP rank with a wanted recovery; the job of a run.

    Parameters
    ----------
    base : Base
        The base model.
    sample : Sample
        The rows.
    given : MergeInputs
        What is merged.
    method : str
        The merge whose factors are gated.
    solver : SolverConfig, optional
        Effort of the factorisation.
    recovery : float
        Recovery to reach (fraction).
    target : Path
        JSON file of the outcome.
    on_event : callable
        Called with ``rank`` and its ``recovery`` after each.

    Returns
    -------
    RankSearch
    """
    loaded = base.load()
    adapters = given.adapters_in_memory()
    measure = RoutedRecovery(
        loaded.model,
        adapters,
        sample.token_rows(loaded),
        method=method,
        statistics=given.read_statistics(),
        solver=solver,
        seed=given.seed,
        token_budget=sample.token_budget,
    )

    def reported(rank: int) -> float:
        found = measure(rank)
        on_event({"rank": rank, "recovery": found})
        return found

    outcome = find_rank(reported, adapters, recovery)
    write_json(target, asdict(outcome))
    return outcome
