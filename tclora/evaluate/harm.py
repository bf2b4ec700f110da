"""What adapters do to each other's clusters: the table of `cross`, and what foretells it.

Symbols: K clusters. The harm H[k, j] is by how much the NLL of cluster k's rows rises when adapter
j is added to the cluster's own.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.evaluate.statistics import Array, Bootstrap, by_seed, difference
from tclora.library.names import cluster_name, cluster_number

COLUMNS = ("cluster", "adapter", "added", "n", "nll", "low", "high", "change", "change_low",
           "change_high")  # fmt: skip
_EXACT = 7  # clusters of which all permutations are looked at
_DRAWN = 2000  # permutations of more clusters
_FEWEST = 4  # clusters that a correlation has an interval from


def summarise_cross(
    items: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Summarise what `tclora.evaluate.cross.measure_cross` has written.

    Parameters
    ----------
    items : DataFrame
        Columns id, cluster, adapter, added, nll (nats), tokens.
    confidence, resamples, seed
        See `tclora.evaluate.recovery.summarise`.

    Returns
    -------
    DataFrame
        Columns cluster, adapter, added, n, nll, low, high (nats per response token), and change,
        change_low, change_high: against the cluster's own adapter alone, paired item by item, so
        that where the adapter was added it is the harm that it does.
    """
    bootstrap = Bootstrap(confidence, resamples, seed)
    rows = [
        (cluster, *row)
        for cluster, part in items.groupby("cluster", sort=True)
        for row in _of_cluster(int(str(cluster)), part, bootstrap)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_cluster(
    cluster: int, part: pd.DataFrame, bootstrap: Bootstrap
) -> Iterator[tuple[object, ...]]:
    models = dict(list(part.groupby(["adapter", "added"], sort=False)))
    nll = np.stack([by_seed(rows, "nll") for rows in models.values()])
    tokens = by_seed(next(iter(models.values())), "tokens")
    n, points = tokens.shape[1], nll.sum((1, 2)) / tokens.sum()
    draws = bootstrap.sums(nll) / bootstrap.sums(tokens[None])
    own = list(models).index((cluster_name(cluster), False))
    for place, (adapter, added) in enumerate(models):
        ends = bootstrap.interval(draws[place])
        change = difference(points[place] - points[own], draws[place] - draws[own], bootstrap, n=n)
        yield adapter, added, n, points[place], *ends, *change[:3]


def harm_table(crossed: pd.DataFrame, names: Sequence[str], column: str = "change") -> pd.DataFrame:
    """Return the harm as a K × K frame: row a cluster by its adapter's name, column the added one.

    NaN on the diagonal and where it was not measured. The ends of its intervals are other columns
    of `summarise_cross`.
    """
    added = crossed[crossed["added"].eq(True)]
    table = added.assign(row=[cluster_name(int(k)) for k in added["cluster"]])
    wide = table.pivot(index="row", columns="adapter", values=column)
    return wide.reindex(index=list(names), columns=list(names)).astype(float)


def square(pairs: pd.DataFrame, names: Sequence[str], measure: str) -> pd.DataFrame:
    """Return a measure of pairs as a symmetric K × K frame, NaN on the diagonal."""
    table = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    for row in pairs.to_dict("records"):
        table.loc[row["first"], row["second"]] = row[measure]
        table.loc[row["second"], row["first"]] = row[measure]
    return table


def correlate(
    harm: pd.DataFrame,
    pairs: pd.DataFrame,
    measures: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate measures of the factors with the harm that adapters do, over ordered pairs.

    Parameters
    ----------
    harm : DataFrame
        K × K; see `harm_table`.
    pairs : DataFrame
        Columns first, second and the measures; see `tclora.tensor.interference`.
    measures : sequence of str
        Which measures.
    confidence, resamples, seed
        See `tclora.evaluate.recovery.summarise`.

    Returns
    -------
    DataFrame
        Columns measure, clusters, n (ordered pairs), rho (Spearman), low, high (bootstrap over
        clusters; NaN with fewer than four), p (permutations of the clusters).

    Notes
    -----
    Pairs that share a cluster depend on each other, so that neither is taken over pairs: p is that
    of Mantel's test, which permutes rows and columns together.

    References
    ----------
    Mantel (1967), "The detection of disease clustering and a generalized regression approach",
    Cancer Research 27.
    """
    names, rng = list(harm.index), np.random.default_rng(seed)
    H, K = harm.to_numpy(float), len(harm)
    bootstrap = Bootstrap(confidence, resamples, seed)
    chosen = rng.integers(0, K, size=(resamples if K >= _FEWEST else 0, K))
    orders = list(_orders(K, rng))
    rows = []
    for measure in measures:
        M = square(pairs, names, measure).to_numpy(float)
        rho, n = _spearman(H, M)
        draws = np.array([_spearman(*(X[np.ix_(c, c)] for X in (H, M)))[0] for c in chosen])
        ends = bootstrap.interval(draws) if len(draws) else (np.nan, np.nan)
        others = np.array([_spearman(H, M[np.ix_(order, order)])[0] for order in orders])
        p = float((np.abs(others) >= abs(rho) - 1e-12).mean()) if not np.isnan(rho) else np.nan
        rows.append((measure, K, n, rho, *ends, p))
    return pd.DataFrame(rows, columns=["measure", "clusters", "n", "rho", "low", "high", "p"])


def foretold(
    crossed: pd.DataFrame,
    pairs: pd.DataFrame,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate every measure of pairs with the harm of `summarise_cross`; see `correlate`."""
    adapters = map(str, crossed["adapter"].unique())
    names = [name for name in adapters if cluster_number(name) is not None]
    return correlate(
        harm_table(crossed, names),
        pairs,
        [str(column) for column in pairs if column not in ("first", "second")],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def _orders(K: int, rng: np.random.Generator) -> Iterator[NDArray[np.int_]]:
    """Yield permutations of K clusters, the identity first."""
    if K <= _EXACT:
        yield from map(np.array, permutations(range(K)))
        return
    yield np.arange(K)
    yield from (rng.permutation(K) for _ in range(_DRAWN))


def _spearman(H: Array, M: Array) -> tuple[float, int]:
    """Return Spearman's correlation of two tables where both are known, and how many cells."""
    known = ~(np.isnan(H) | np.isnan(M))
    x, y = (pd.Series(table[known]).rank() for table in (H, M))
    if known.sum() < 3 or not np.ptp(x) or not np.ptp(y):
        return np.nan, int(known.sum())
    return float(np.corrcoef(x, y)[0, 1]), int(known.sum())
