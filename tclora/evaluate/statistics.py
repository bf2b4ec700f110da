"""Resampling of items and training seeds: intervals, paired differences, Holm's correction.

Symbols: S training seeds, n items, M quantities (methods, say), R resamples.

Values are arrays (M, S, n): every seed's model answers the same items. Items and seeds are
therefore resampled across each other: a resample draws seeds, and items that all of its seeds
share. To draw items anew within each seed, as if they were other ones, would divide their part of
the variance by S. All M quantities see the same resamples, so that differences are paired.

References
----------
Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1(2).
Rao, Wu (1988), "Resampling inference with complex survey data", JASA 83: seeds are few, so S − 1 of
them are drawn with weight S / (S − 1), which leaves the variance right.
Holm (1979), "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6(2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
CHUNK = 200  # resamples at once, to bound memory


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes
    ----------
    confidence : float
        Level of the intervals, 0 to 1.
    resamples : int
        Bootstrap resamples R.
    seed : int
        Seed of the resampling.
    """

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def sums(self, values: ArrayLike, *, apart: int = 0) -> Array:
        """Return the resampled sums over items, averaged over seeds.

        Parameters
        ----------
        values : array, shape (M, S, n)
            What is summed.
        apart : int
            Items of other numbers are drawn independently of each other; seeds are drawn alike, as
            every one of them has trained what all of the items are answered by.

        Returns
        -------
        array, shape (M, R)
        """
        table = np.asarray(values, dtype=float)
        _, seeds, n = table.shape
        parts = [
            np.einsum("rs,rn,msn->mr", of_seeds / seeds, of_items, table, optimize=True)
            for of_seeds, of_items in self._weights(seeds, n, apart)
        ]
        return np.concatenate(parts, axis=1)

    def _weights(self, seeds: int, n: int, apart: int) -> Iterator[tuple[Array, Array]]:
        """Yield the weights of seeds (≤ CHUNK, S) and of items (≤ CHUNK, n) in the resamples."""
        items = np.random.default_rng(self.seed + apart)
        models = np.random.default_rng((self.seed, seeds))  # items alike however many seeds
        for start in range(0, self.resamples, CHUNK):
            size = min(CHUNK, self.resamples - start)
            by_item = items.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
            drawn = models.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), size=size)
            yield drawn.astype(float) * (seeds / max(1, seeds - 1)), by_item

    def interval(self, draws: Array) -> tuple[float, float]:
        """Return the percentile interval of resampled figures; NaN where none is defined."""
        if np.isnan(draws).all():
            return np.nan, np.nan
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(draws, [tail, 1 - tail])
        return float(low), float(high)

    def extreme_share(self, share: float, n: int) -> tuple[float, float]:
        """Return the exact interval of a share that is 0 or 1, of which every resample is alike.

        Notes
        -----
        Clopper and Pearson's: 0 of n rules out shares whose n misses are less likely than half of
        1 - confidence.
        """
        reach = 1 - ((1 - self.confidence) / 2) ** (1 / n)
        return (0.0, reach) if share == 0 else (1 - reach, 1.0)


class Difference(NamedTuple):
    """A paired difference of two figures, its interval, and p of its being none."""

    value: float
    low: float
    high: float
    p: float


def difference(
    point: float, draws: Array, bootstrap: Bootstrap, *, n: int, largest: float = np.inf
) -> Difference:
    """Return a difference with its interval and its two-sided p.

    Parameters
    ----------
    point : float
        The difference as measured.
    draws : array, shape (R,)
        The difference in each resample, NaN where it is not defined.
    bootstrap : Bootstrap
        How the draws were made.
    n : int
        Items that were resampled.
    largest : float
        What the difference on one item cannot exceed, on either side.

    Notes
    -----
    p is the normal approximation with the standard error of the draws: shares of draws beyond zero
    cannot tell apart what is below 2 / R, which a correction for many comparisons needs.

    Draws say nothing where there is one item, or where all resamples have one difference other than
    zero. p is then that of the exact sign test, 2 · 0.5ⁿ but at most 1. The interval holds what is
    possible where, as in `Bootstrap.extreme_share`, a share of other items was missed that differ
    by as much as `largest`; it is NaN where nothing bounds that.
    """
    if np.isnan(point) or np.isnan(draws).all():
        return Difference(point, *bootstrap.interval(draws), np.nan)
    error = float(np.nanstd(draws))
    alike = error <= 1e-12 * max(1.0, abs(point))  # but for rounding
    if alike and abs(point) <= 1e-12:
        return Difference(point, *bootstrap.interval(draws), 1.0)
    if alike or n == 1:
        missed = bootstrap.extreme_share(0, n)[1] if np.isfinite(largest) else np.nan
        low, high = (point + missed * (end - point) for end in (-largest, largest))
        return Difference(point, low, high, min(1.0, 2 * 0.5**n))
    return Difference(point, *bootstrap.interval(draws), float(2 * ndtr(-abs(point) / error)))


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted for being several, so that one may compare each with the level.

    Parameters
    ----------
    p : sequence of float
        p of every comparison of the family; those that are NaN do not belong to it.

    Returns
    -------
    list of float
        In the order of `p`; at most 1.
    """
    values = np.asarray(p, dtype=float)
    adjusted = np.full_like(values, np.nan)
    order = np.argsort(values)[: int((~np.isnan(values)).sum())]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * factors))
    return [float(value) for value in adjusted]


def seeds_of(items: pd.DataFrame) -> int:
    """Return how many training seeds measured items come from; 1 where they do not say."""
    return int(items["seed"].nunique()) if "seed" in items else 1


def by_seed(items: pd.DataFrame, column: str) -> Array:
    """Return a column of one method's items as an array (S, n), items in the order of their ids.

    Raises
    ------
    ValueError
        If the seeds have measured different items.
    """
    seeds = items["seed"] if "seed" in items else pd.Series(0, index=items.index)
    keys = ["seed", *(["task"] if "task" in items else []), "id"]  # ids are a task's own
    ordered = items.assign(seed=seeds).sort_values(keys, kind="stable")
    parts = [part for _, part in ordered.groupby("seed", sort=True)]
    if any(list(part["id"]) != list(parts[0]["id"]) for part in parts):
        counts = [len(part) for part in parts]
        raise ValueError(f"every seed must measure the same items, got {counts} of them")
    return np.stack([part[column].to_numpy(float) for part in parts])
