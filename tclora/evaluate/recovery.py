"""From measured items to figures with intervals: NLL, accuracy, and the recovery of a merge.

Recovery of a method on cluster k = (NLL_base - NLL_method) / (NLL_base - NLL_own): 0 is the base
model, 1 the cluster's own adapter. Intervals are percentile bootstraps over items; base, method and
own adapter share each resample, so that the comparison is paired.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.library.names import BASE, OWN

Array = NDArray[np.float64]
_Row = tuple[str, str, int, float, float, float]
_CHUNK = 200  # resamples at once, to bound memory


def summarise(
    items: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Summarise items per method, split and group (all rows, each task, cluster, set of skills).

    Parameters
    ----------
    items : DataFrame
        Columns method, split, task, cluster, id, nll (nats; NaN where it was not measured), tokens,
        correct, and correct_norm where there are choices.
    confidence : float
        Level of the intervals.
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    DataFrame
        Columns method, split, group_kind, group, n, nll, nll_low, nll_high (nats per response
        token), accuracy, accuracy_low, accuracy_high (mean scores, 0 to 1; NaN where nothing was
        scored), and the same of accuracy_norm, by length-normalised log-likelihood.
    """
    rows = []
    for (method, split), part in items.groupby(["method", "split"], sort=False):
        for kind, name, group in _groups(part):
            read = group.dropna(subset=["nll"])
            nll = _ratio(read["nll"], read["tokens"], confidence, resamples, seed)
            means = [
                _mean(group[column], confidence, resamples, seed)
                for column in ("correct", "correct_norm")
                if column in group
            ]
            rows.append((method, split, kind, name, len(group), *nll, *sum(means, ())))
    names = ["nll", "accuracy", *(["accuracy_norm"] if "correct_norm" in items else [])]
    figures = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "split", "group_kind", "group", "n", *figures])


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
        Columns method, cluster ("0", "1", …, "mean", "worst"), n, recovery, low, high. Clusters
        whose own adapter does not beat the base have NaN and do not enter mean and worst. "mean"
        counts the rows of the clusters that enter it, "worst" those of the cluster it is, and
        "worst" has no ends: a minimum of estimates lies below the least recovery however many
        resamples are drawn, so that percentiles of it would not cover what they claim.
    """
    test = items[items["split"] == "test"]
    methods = [m for m in test["method"].unique() if m not in {BASE, OWN, against}]
    rows: list[_Row] = []
    for method in methods:
        draws, points, counts = [], [], []
        for cluster, part in test.groupby("cluster", sort=True):
            tables = [
                part[part["method"] == name].set_index("id")[["nll", "tokens"]]
                for name in (BASE, OWN, against or BASE, method)
            ]
            # Clusters are independent: each has resamples of its own, the same for every method.
            point, sample = _cluster_recovery(tables, resamples, seed + int(str(cluster)))
            points.append(point)
            draws.append(sample)
            counts.append(len(tables[0]))
            rows.append((method, str(cluster), counts[-1], point, *_interval(sample, confidence)))
        rows += _overall(method, np.array(points), np.array(draws), np.array(counts), confidence)
    return pd.DataFrame(rows, columns=["method", "cluster", "n", "recovery", "low", "high"])


def paired_interval(
    differences: Array, weights: Array, *, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ differences / Σ weights over items drawn together.

    Parameters
    ----------
    differences, weights : ndarray, shape (n,)
        Per item.
    confidence, resamples, seed
        See `summarise`.
    """
    draws = [
        counts @ differences / (counts @ weights)
        for counts in _resample_counts(len(differences), resamples, seed)
    ]
    return _interval(np.concatenate(draws), confidence)


def _overall(
    method: str, points: Array, draws: Array, counts: NDArray[np.int_], confidence: float
) -> Iterator[_Row]:
    defined = ~np.isnan(points)
    if not defined.any():
        yield method, "mean", 0, np.nan, np.nan, np.nan
        yield method, "worst", 0, np.nan, np.nan, np.nan
        return
    points, counts = points[defined], counts[defined]
    ends = _interval(draws[defined].mean(0), confidence)
    yield method, "mean", int(counts.sum()), float(points.mean()), *ends
    worst = int(points.argmin())
    yield method, "worst", int(counts[worst]), float(points[worst]), np.nan, np.nan


def _cluster_recovery(tables: list[pd.DataFrame], resamples: int, seed: int) -> tuple[float, Array]:
    rows = tables[0].index
    tokens = tables[0]["tokens"].to_numpy(float)
    totals = [table.loc[rows, "nll"].to_numpy(float) for table in tables]
    b, o, a, m = (total.sum() for total in totals)
    if b <= o:
        return np.nan, np.full(resamples, np.nan)
    draws = [
        np.stack([counts @ total / (counts @ tokens) for total in totals])
        for counts in _resample_counts(len(tokens), resamples, seed)
    ]
    B, O, A, M = np.concatenate(draws, axis=1)  # noqa: E741
    return float((a - m) / (b - o)), (A - M) / np.where(B > O, B - O, np.nan)


def _groups(part: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    yield "all", "all", part
    for kind in ("task", "cluster", *(["skills"] if "skills" in part else [])):
        for name, group in part.dropna(subset=[kind]).groupby(kind, sort=True):
            yield kind, str(name), group


def _mean(
    values: pd.Series, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Point and interval of the mean of what is not NaN."""
    known = values.dropna()
    return _ratio(known, pd.Series(1.0, index=known.index), confidence, resamples, seed)


def _ratio(
    numerator: pd.Series, denominator: pd.Series, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Point and interval of Σ numerator / Σ denominator; NaN without rows."""
    if numerator.empty:
        return np.nan, np.nan, np.nan
    top, bottom = numerator.to_numpy(float), denominator.to_numpy(float)
    draws = [
        counts @ top / (counts @ bottom) for counts in _resample_counts(len(top), resamples, seed)
    ]
    return float(top.sum() / bottom.sum()), *_interval(np.concatenate(draws), confidence)


def _resample_counts(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each of n items is drawn in each resample, (≤ 200, n) at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)


def _interval(draws: Array, confidence: float) -> tuple[float, float]:
    if np.isnan(draws).all():
        return np.nan, np.nan
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
