"""Which merge wins a column of a table, and which are not told apart from it.

Every two merges of a column are compared, item by item, and p is corrected for all of these
comparisons (Holm): the best merge is chosen by the same items, so that correcting for its own
comparisons alone would be too little.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from tclora.evaluate.recovery import METRICS, ClusterRecovery, groups, recoveries, resampled
from tclora.evaluate.statistics import Array, Bootstrap, Difference, difference, holm, seeds_of
from tclora.library.names import BASE, OWN, REFERENCES

SHARES = ("accuracy", "accuracy_norm")  # metrics whose items score 0 to 1
COLUMNS = ("metric", "split", "group_kind", "group", "method", "best", "n", "seeds",
           "difference", "low", "high", "p", "tie")  # fmt: skip


class Column(NamedTuple):
    """One column of a table: what is compared in it, the larger the better.

    Attributes
    ----------
    metric, split, group_kind, group : str
        Of "recovery" the groups are clusters, and "mean" of kind "all".
    n : int
        Items.
    fewest : int
        Items that alone decide a difference: `n`, or those of the smallest cluster of a mean.
    points : Mapping[str, float]
        Merge → its figure; with minus where the smaller is better.
    draws : Mapping[str, Array]
        The same in each resample.
    """

    metric: str
    split: str
    group_kind: str
    group: str
    n: int
    fewest: int
    points: Mapping[str, float]
    draws: Mapping[str, Array]


def winners(
    items: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Compare the best merge of every column of the evaluation's tables with the others.

    Parameters
    ----------
    items, confidence, resamples, seed
        See `tclora.evaluate.recovery.summarise`.

    Returns
    -------
    DataFrame
        One row per column and merge that is not its best: metric, split, group_kind, group, method,
        best, n and seeds (items and training seeds), difference (by how much `best` is better),
        low, high, p (adjusted), and tie: whether p is not within 1 - confidence, or unknown.
    """
    bootstrap = Bootstrap(confidence, resamples, seed)
    merges = [m for m in items["method"].unique() if m not in REFERENCES]
    rows = [
        row
        for column in _columns(items, merges, bootstrap)
        if len(column.points) > 1
        for row in _compared(column, seeds_of(items), bootstrap)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _compared(column: Column, seeds: int, bootstrap: Bootstrap) -> Iterator[tuple[object, ...]]:
    best = max(column.points, key=lambda name: column.points[name])
    pairs = [(best, name) for name in column.points if name != best]
    pairs += [pair for pair in combinations(column.points, 2) if best not in pair]
    found = [_difference(column, one, other, bootstrap) for one, other in pairs]
    adjusted = holm([result.p for result in found])
    for (one, other), result, p in zip(pairs, found, adjusted, strict=True):
        if one == best:
            figures = (result.value, result.low, result.high, p)
            tie = not p <= 1 - bootstrap.confidence  # NaN is not told apart
            yield (*column[:4], other, best, column.n, seeds, *figures, tie)


def _difference(column: Column, one: str, other: str, bootstrap: Bootstrap) -> Difference:
    point = column.points[one] - column.points[other]
    largest = 1.0 if column.metric in SHARES else np.inf
    draws = column.draws[one] - column.draws[other]
    return difference(point, draws, bootstrap, n=column.fewest, largest=largest)


def _columns(items: pd.DataFrame, merges: Sequence[str], bootstrap: Bootstrap) -> Iterator[Column]:
    test = items[items["split"] == "test"]
    if {BASE, OWN} <= set(test["method"]):
        yield from _recovery_columns(test, merges, bootstrap)
    for split, part in items[items["method"].isin(merges)].groupby("split", sort=False):
        for kind, name, group in groups(part):
            for metric in METRICS:
                if METRICS[metric] in items:
                    yield _metric_column(metric, (str(split), kind, name), group, bootstrap)


def _recovery_columns(
    test: pd.DataFrame, merges: Sequence[str], bootstrap: Bootstrap
) -> Iterator[Column]:
    measured = [name for name in merges if name in set(test["method"])]
    found = [r for r in recoveries(test, measured, bootstrap) if not np.isnan(r.points).any()]
    if not found or not measured:
        return
    points = np.mean([part.points for part in found], axis=0)
    draws = np.mean([part.draws for part in found], axis=0)
    mean = ClusterRecovery("mean", sum(part.n for part in found), points, draws)
    smallest = min(part.n for part in found)
    for part in (mean, *found):
        kind, fewest = ("all", smallest) if part is mean else ("cluster", part.n)
        by_name = dict(zip(measured, part.points.tolist(), strict=True))
        named = dict(zip(measured, part.draws, strict=True))
        yield Column("recovery", "test", kind, part.cluster, part.n, fewest, by_name, named)


def _metric_column(
    metric: str, place: tuple[str, str, str], group: pd.DataFrame, bootstrap: Bootstrap
) -> Column:
    sign = -1 if metric == "nll" else 1
    found = {name: r for name, r in resampled(group, metric, bootstrap).items() if r.n}
    n = max((figure.n for figure in found.values()), default=0)
    paired = {name: figure for name, figure in found.items() if figure.n == n}
    points = {name: sign * figure.point for name, figure in paired.items()}
    return Column(metric, *place, n, n, points, {m: sign * f.draws for m, f in paired.items()})
