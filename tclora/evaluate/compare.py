"""Two results item by item: the difference with a paired bootstrap interval, wins, losses, ties.

Where both are of several training seeds, these are paired too and resampled beside the items
(`tclora.evaluate.statistics`): an item that three seeds answered is one item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tclora.errors import DataError
from tclora.evaluate.statistics import Bootstrap, by_seed, seeds_of

METRICS = ("correct", "correct_norm", "nll")


@dataclass(frozen=True)
class Comparison:
    """Two results on the same items.

    Attributes
    ----------
    task : str
        "all" for all of them.
    n : int
        Items that both have.
    seeds : int
        Training seeds of both.
    first, second : float
        Their means; of "nll", nats per response token.
    difference, low, high : float
        first - second, with its interval.
    wins, losses, ties : int
        Items on which the first is better, worse, equal, on the average of the seeds.
    """

    task: str
    n: int
    seeds: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


def compare_items(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metric: str = "correct",
    *,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare two results on the items that both have.

    Parameters
    ----------
    first, second : DataFrame
        Columns task, id, those of `tclora.evaluate.measure.evaluate_frame`, and seed where there
        are several; an id is an item's own within its task.
    metric : {"correct", "correct_norm", "nll"}
        What is compared; lower is better for "nll" alone.
    confidence, resamples, seed
        Of the intervals.

    Returns
    -------
    list of Comparison
        All items, then each task where there are several.

    Raises
    ------
    DataError
        If they share no item with this metric, or are not of the same training seeds.
    """
    sides = [part.assign(seed=part.get("seed", 0)) for part in (first, second)]
    trained = [sorted(set(part["seed"])) for part in sides]
    if trained[0] != trained[1]:
        raise DataError(
            f"the results must be of the same training seeds, got {trained[0]} and {trained[1]}; "
            "compare libraries whose runs had the same `seeds`"
        )
    keys = ["task", "id", "seed"]
    one, two = (part[[*keys, metric, "tokens"]] for part in sides)
    both = one.merge(two, on=keys, suffixes=("_1", "_2"))
    both = both.dropna(subset=[f"{metric}_1", f"{metric}_2"])
    both = both[both.groupby(["task", "id"])["seed"].transform("size") == len(trained[0])]
    if both.empty:
        raise DataError(f"the results must share items with {metric!r}, but share none")
    parts = [("all", both)]
    if both["task"].nunique() > 1:
        parts += [(str(task), part) for task, part in both.groupby("task", sort=True)]
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return [_compare(task, part, metric, **options) for task, part in parts]


def _compare(
    task: str, both: pd.DataFrame, metric: str, *, confidence: float, resamples: int, seed: int
) -> Comparison:
    first, second = (by_seed(both, f"{metric}_{i}") for i in (1, 2))  # (S, n)
    weights = by_seed(both, "tokens_1") if metric == "nll" else np.ones_like(first)
    bootstrap = Bootstrap(confidence, resamples, seed)
    differences, totals = bootstrap.sums(np.stack([first - second, weights]))
    low, high = bootstrap.interval(differences / totals)
    one, two = first.mean(axis=0), second.mean(axis=0)
    equal = np.isclose(one, two, rtol=1e-6, atol=1e-9)
    better = (one < two) if metric == "nll" else (one > two)
    ties, wins = int(equal.sum()), int((better & ~equal).sum())
    total = weights.sum()
    return Comparison(
        task=task,
        n=len(one),
        seeds=seeds_of(both),
        first=float(first.sum() / total),
        second=float(second.sum() / total),
        difference=float((first - second).sum() / total),
        low=low,
        high=high,
        wins=wins,
        losses=len(one) - wins - ties,
        ties=ties,
    )


def result_items(items: pd.DataFrame, method: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Return one method's items, of some tasks only where any are named.

    Raises
    ------
    DataError
        If there are none.
    """
    chosen = items[items["method"] == method]
    if chosen.empty:
        known = ", ".join(sorted(set(items["method"])))
        raise DataError(
            f"the result must be of a method that was measured, got {method!r}; {known}"
        )
    missing = sorted(set(tasks) - set(chosen["task"]))
    if missing:
        known = ", ".join(sorted(set(chosen["task"])))
        raise DataError(f"--tasks must be tasks of the result, got {missing}; it has {known}")
    return chosen[chosen["task"].isin(tasks)] if tasks else chosen
