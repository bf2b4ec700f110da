"""Two results item by item: the difference with a paired bootstrap interval, wins, losses, ties."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tclora.errors import ConfigError, DataError
from tclora.evaluate.statistics import Bootstrap, by_seed, difference, seeds_of

METRICS = ("correct", "correct_norm", "nll")


@dataclass(frozen=True)
class Comparison:
    """Two results on the same items.

    Attributes
    ----------
    task : str
        "all" for all of them.
    n, seeds : int
        Items that both have with every training seed that both have, and these seeds.
    first, second : float
        Their means; of "nll", nats per response token.
    difference, low, high : float
        first - second, with its interval; see `tclora.evaluate.statistics.difference`.
    wins, losses, ties : int
        Items on which the first is better, worse, equal in the mean over the seeds.
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
    names: tuple[str, str] = ("first", "second"),
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare two results on the items that both have.

    Parameters
    ----------
    first, second : DataFrame
        Columns task, id and those of `tclora.evaluate.measure.evaluate_frame`, and seed where there
        are several training seeds; an id is an item's own within its task.
    metric : {"correct", "correct_norm", "nll"}
        What is compared; lower is better for "nll" alone.
    names : tuple of str
        What messages call the results.
    confidence, resamples, seed
        Of the intervals.

    Returns
    -------
    list of Comparison
        All items, then each task where there are several.

    Raises
    ------
    ConfigError
        If only one of them has training seeds.
    DataError
        If they share no training seed, or no item with this metric.
    """
    _check_seeds(first, second, names)
    keys = [key for key in ("task", "id", "seed") if key in first]
    columns = [*keys, metric, "tokens"]
    both = first[columns].merge(second[columns], on=keys, suffixes=("_1", "_2"))
    known = both[[f"{metric}_1", f"{metric}_2"]].notna().all(axis=1)
    with_all = known.groupby([both["task"], both["id"]]).transform("sum") == seeds_of(both)
    both = both[with_all]
    if both.empty:
        raise DataError(f"the results must share items with {metric!r}, but share none")
    parts = [("all", both)]
    if both["task"].nunique() > 1:
        parts += [(str(task), part) for task, part in both.groupby("task", sort=True)]
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return [_compare(task, part, metric, **options) for task, part in parts]


def _check_seeds(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> None:
    if "seed" in first and "seed" in second:
        if not set(first["seed"]) & set(second["seed"]):
            have = " and ".join(
                f"{name} has {sorted(set(items['seed']))}"
                for name, items in zip(names, (first, second), strict=True)
            )
            raise DataError(f"results of several training seeds must share some, but {have}")
    elif "seed" in first or "seed" in second:
        several, single = names if "seed" in first else names[::-1]
        raise ConfigError(
            "both results must have training seeds, or neither: "
            f"{several} has {seeds_of(first if 'seed' in first else second)}, {single} does not "
            "name any; run both with the same `seeds`, or compare a result of one training with "
            f"{single}"
        )


def _compare(
    task: str, both: pd.DataFrame, metric: str, *, confidence: float, resamples: int, seed: int
) -> Comparison:
    one, two = (by_seed(both, f"{metric}_{i}") for i in (1, 2))
    weights = by_seed(both, "tokens_1") if metric == "nll" else np.ones_like(one)
    bootstrap = Bootstrap(confidence, resamples, seed)
    sums, totals = bootstrap.sums(np.stack([one - two, weights]))
    (seeds, n), total = one.shape, weights.sum()
    largest = np.inf if metric == "nll" else 1.0
    point = float((one - two).sum() / total)
    found = difference(point, sums / totals, bootstrap, n=n, largest=largest)
    own, other = one.mean(axis=0), two.mean(axis=0)
    equal = np.isclose(own, other, rtol=1e-6, atol=1e-9)
    better = (own < other) if metric == "nll" else (own > other)
    ties, wins = int(equal.sum()), int((better & ~equal).sum())
    return Comparison(
        task=task,
        n=n,
        seeds=seeds,
        first=float(one.sum() / total),
        second=float(two.sum() / total),
        difference=point,
        low=found.low,
        high=found.high,
        wins=wins,
        losses=n - wins - ties,
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
