"""Two results item by item: the difference with a paired bootstrap interval, wins, losses, ties."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tclora.errors import DataError
from tclora.evaluate.statistics import Bootstrap

METRICS = ("correct", "correct_norm", "nll")
_PAIRED_BY = ["task", "id", "seed"]  # the last where several trainings were measured


@dataclass(frozen=True)
class Comparison:
    """Two results on the same items.

    Attributes
    ----------
    task : str
        "all" for all of them.
    n : int
        Items that both have.
    first, second : float
        Their means; of "nll", nats per response token.
    difference, low, high : float
        first - second, with its interval.
    wins, losses, ties : int
        Items on which the first is better, worse, equal.
    """

    task: str
    n: int
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
        Columns task, id and those of `tclora.evaluate.measure.evaluate_frame`; an id is an item's
        own within its task.
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
        If they share no item with this metric.
    """
    keys = [key for key in _PAIRED_BY if key in first and key in second]
    columns = [*keys, metric, "tokens"]
    both = first[columns].merge(second[columns], on=keys, suffixes=("_1", "_2"))
    both = both.dropna(subset=[f"{metric}_1", f"{metric}_2"])
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
    one, two = (both[f"{metric}_{i}"].to_numpy(float) for i in (1, 2))
    weights = both["tokens_1"].to_numpy(float) if metric == "nll" else np.ones(len(both))
    bootstrap = Bootstrap(confidence, resamples, seed)
    differences, totals = bootstrap.sums(np.stack([one - two, weights])[:, None])
    low, high = bootstrap.interval(differences / totals)
    equal = np.isclose(one, two, rtol=1e-6, atol=1e-9)
    better = (one < two) if metric == "nll" else (one > two)
    ties, wins = int(equal.sum()), int((better & ~equal).sum())
    total = weights.sum()
    return Comparison(
        task=task,
        n=len(both),
        first=float(one.sum() / total),
        second=float(two.sum() / total),
        difference=float((one - two).sum() / total),
        low=low,
        high=high,
        wins=wins,
        losses=len(both) - wins - ties,
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
