"""From measured items to figures with intervals: NLL, accuracy, and the recovery of a merge.

Recovery of a method on cluster k = (NLL_base - NLL_method) / (NLL_base - NLL_own): 0 is the base
model, 1 the cluster's own adapter. Intervals are percentile bootstraps over items, and over
training seeds where there are several (`tclora.evaluate.statistics`); base, method and own adapter
share each resample, so that the comparison is paired. Over seeds, figures are those of the sums.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tclora.evaluate.statistics import Array, Bootstrap, by_seed, seeds_of
from tclora.library.names import BASE, OWN

METRICS = {"nll": "nll", "accuracy": "correct", "accuracy_norm": "correct_norm"}  # to columns
_Row = tuple[str, str, int, float, float, float]


def summarise(
    items: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Summarise items per method, split and group (all rows, each task, cluster, set of skills).

    Parameters
    ----------
    items : DataFrame
        Columns method, split, task, cluster, id, nll (nats; NaN where it was not measured), tokens,
        correct, correct_norm where there are choices, and seed where there are several.
    confidence : float
        Level of the intervals.
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    DataFrame
        Columns method, split, group_kind, group, n, seeds (items of each training seed, and
        training seeds), nll, nll_low, nll_high, nll_n (nats per response token, and items it was
        measured on), and the same of accuracy (mean scores, 0 to 1; NaN where nothing was scored)
        and of accuracy_norm, by length-normalised log-likelihood.
    """
    bootstrap = Bootstrap(confidence, resamples, seed)
    metrics = [metric for metric, column in METRICS.items() if column in items]
    rows = []
    for split, part in items.groupby("split", sort=False):
        for kind, name, group in groups(part):
            found = {metric: resampled(group, metric, bootstrap) for metric in metrics}
            for method, own in group.groupby("method", sort=False):
                seeds = seeds_of(own)
                row: list[object] = [method, split, kind, name, len(own) // seeds, seeds]
                for metric in metrics:
                    row += _figure(metric, found[metric][str(method)], bootstrap)
                rows.append(row)
    names = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high", "_n")]
    columns = ["method", "split", "group_kind", "group", "n", "seeds", *names]
    return pd.DataFrame(rows, columns=columns)


def recovery(
    items: pd.DataFrame,
    *,
    against: str | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Recovery of every method on the in-domain test rows.

    Parameters
    ----------
    items : DataFrame
        As in `summarise`; must hold the methods "base" and "own" for the same rows.
    against : str, optional
        A method whose recovery is subtracted from that of every other, resample by resample; the
        "worst" is then the cluster with the least difference.
    confidence, resamples, seed
        See `summarise`.

    Returns
    -------
    DataFrame
        Columns method, cluster ("0", "1", …, "mean", "worst"), n, seeds, recovery, low, high.
        Clusters whose own adapter does not beat the base have NaN and do not enter mean and worst.
        "mean" counts the rows of the clusters that enter it, "worst" those of the cluster it is,
        and "worst" has no ends: a minimum of estimates lies below the least recovery however many
        resamples are drawn, so that percentiles of it would not cover what they claim.
    """
    test = items[items["split"] == "test"]
    methods = [m for m in test["method"].unique() if m not in {BASE, OWN, against}]
    bootstrap = Bootstrap(confidence, resamples, seed)
    names = [*methods, *([against] if against else [])]
    found = [
        _against_last(part) if against else part for part in recoveries(test, names, bootstrap)
    ]
    rows = [row for m, name in enumerate(methods) for row in _rows(name, m, found, bootstrap)]
    columns = ["method", "cluster", "n", "recovery", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(3, "seeds", seeds_of(test))
    return table


class ClusterRecovery(NamedTuple):
    """Recoveries of M methods on one cluster of n items: points (M,) and resamples (M, R)."""

    cluster: str
    n: int
    points: Array
    draws: Array


def recoveries(
    test: pd.DataFrame, methods: Sequence[str], bootstrap: Bootstrap
) -> list[ClusterRecovery]:
    """Return the recoveries of methods on every cluster; NaN where own adapters do not help.

    Items of clusters are independent: each has resamples of its own, the same for every method.
    Training seeds are resampled alike in all of them.
    """
    found = []
    for cluster, part in test.groupby("cluster", sort=True):
        named = {str(name): rows for name, rows in part.groupby("method", sort=False)}
        nll = np.stack([by_seed(named[name], "nll") for name in (BASE, OWN, *methods)])
        tokens = by_seed(named[BASE], "tokens")
        n, apart = tokens.shape[1], int(str(cluster))
        base, own, *rest = nll.sum((1, 2))
        points = np.full(len(methods), np.nan)
        draws = np.full((len(methods), bootstrap.resamples), np.nan)
        if base > own:
            per_token = bootstrap.sums(nll, apart=apart) / bootstrap.sums(tokens[None], apart=apart)
            B, O = per_token[:2]  # noqa: E741
            points = (base - np.array(rest)) / (base - own)
            draws = (B - per_token[2:]) / np.where(B > O, B - O, np.nan)
        found.append(ClusterRecovery(str(cluster), n, points, draws))
    return found


class Resampled(NamedTuple):
    """A figure on n items: as measured, and in each resample (R,); NaN without items."""

    n: int
    point: float
    draws: Array


def resampled(group: pd.DataFrame, metric: str, bootstrap: Bootstrap) -> dict[str, Resampled]:
    """Return every method's figure on a group of rows, on the items that it is known for."""
    found = {str(m): _fraction(rows, metric) for m, rows in group.groupby("method", sort=False)}
    figures = {}
    for shape in {top.shape for top, _ in found.values()}:
        names = [name for name, (top, _) in found.items() if top.shape == shape]
        tops, bottoms = np.stack([found[name] for name in names], axis=1)
        points, draws = np.full(len(names), np.nan), np.full((len(names), 1), np.nan)
        if shape[1]:
            points = tops.sum((1, 2)) / bottoms.sum((1, 2))
            draws = bootstrap.sums(tops) / bootstrap.sums(bottoms)
        for name, point, drawn in zip(names, points.tolist(), draws, strict=True):
            figures[name] = Resampled(shape[1], point, drawn)
    return figures


def _fraction(rows: pd.DataFrame, metric: str) -> tuple[Array, Array]:
    """Return numerator and denominator of a metric, (S, n), over the items that it is known for."""
    top = by_seed(rows, METRICS[metric])
    bottom = by_seed(rows, "tokens") if metric == "nll" else np.ones_like(top)
    known = ~np.isnan(top).any(axis=0)
    return top[:, known], bottom[:, known]


def groups(part: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield kind, name and rows of every group that figures are given for."""
    yield "all", "all", part
    for kind in ("task", "cluster", *(["skills"] if "skills" in part else [])):
        for name, group in part.dropna(subset=[kind]).groupby(kind, sort=True):
            yield kind, str(name), group


def _figure(metric: str, found: Resampled, bootstrap: Bootstrap) -> tuple[float, float, float, int]:
    if metric != "nll" and found.point in (0, 1):
        return found.point, *bootstrap.extreme_share(found.point, found.n), found.n
    return found.point, *bootstrap.interval(found.draws), found.n


def _against_last(part: ClusterRecovery) -> ClusterRecovery:
    """Return the recoveries of all methods but the last, minus its."""
    points, draws = part.points[:-1] - part.points[-1], part.draws[:-1] - part.draws[-1]
    return part._replace(points=points, draws=draws)


def _rows(
    method: str, place: int, found: Sequence[ClusterRecovery], bootstrap: Bootstrap
) -> Iterator[_Row]:
    """Yield a method's rows: clusters, mean and worst."""
    for part in found:
        ends = bootstrap.interval(part.draws[place])
        yield method, part.cluster, part.n, float(part.points[place]), *ends
    defined = [part for part in found if not np.isnan(part.points[place])]
    if not defined:
        yield method, "mean", 0, np.nan, np.nan, np.nan
        yield method, "worst", 0, np.nan, np.nan, np.nan
        return
    points = np.array([part.points[place] for part in defined])
    ends = bootstrap.interval(np.mean([part.draws[place] for part in defined], axis=0))
    yield method, "mean", sum(part.n for part in defined), float(points.mean()), *ends
    worst = defined[int(points.argmin())]
    yield method, "worst", worst.n, float(points.min()), np.nan, np.nan
