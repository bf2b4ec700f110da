"""What the adapters do to each other: interference of pairs, harm to rows, energy by layer."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tclora.evaluate.harm import harm_table, square
from tclora.library.contents import Contents
from tclora.library.names import cluster_name, cluster_number
from tclora.report.canvas import half_page
from tclora.report.maps import cell_map
from tclora.report.notation import number, percent
from tclora.report.overview import Fact
from tclora.report.palette import LIGHT

_MEASURES = {
    "cosine": "cosine of the updates",
    "input_overlap": "overlap of the directions read",
    "output_overlap": "overlap of the directions written",
    "sign_conflict": "share of the interaction that cancels",
    "input_angle": "mean angle of the spaces read (degrees)",
    "output_angle": "mean angle of the spaces written (degrees)",
    "input_nearest": "smallest angle of the spaces read (degrees)",
    "output_nearest": "smallest angle of the spaces written (degrees)",
}
_SHOWN = "sign_conflict"
_LAYER = re.compile(r"\.(\d+)\.")
_FEW_LAYERS = 12  # of which each has its number below the map


@dataclass(frozen=True)
class Foretold:
    """How one measure of interference goes with the harm that adapters do, over pairs."""

    rho: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    n: int = 0


@dataclass(frozen=True)
class Correlation:
    """How one measure of interference goes with recovery over clusters, and with harm."""

    measure: str
    mean: float  # over pairs
    rho: float  # Spearman's rank correlation with recovery; NaN where it is not defined
    n: int  # clusters
    harm: Foretold


def interference(contents: Contents) -> Figure | None:
    """Draw how much of every two adapters' interaction cancels, K x K."""
    names = _names(contents)
    if not names:
        return None
    table = square(contents.interference, names, _SHOWN)
    return _by_cluster(table, percent, full=1.0, labels=("cluster", "cluster"))


def harm(contents: Contents) -> Figure | None:
    """Draw by how much the loss of a cluster's rows rises when another adapter is added, K x K."""
    table = harm_table(contents.cross, _names(contents))
    if not table.notna().any(axis=None):
        return None
    low, high = (
        harm_table(contents.cross, _names(contents), f"change_{end}") for end in ("low", "high")
    )
    return _by_cluster(
        table,
        lambda nats: number(nats, 2),
        full=float(np.nanmax(np.abs(table))),
        labels=("adapter that is added", "rows of cluster"),
        sure=(low > 0) | (high < 0),
    )


def layer_map(contents: Contents) -> Figure | None:
    """Draw how much of the adapters' interaction cancels, by layer and kind of module."""
    table = conflict_by_layer(contents.module_interference)
    if table.empty:
        return None
    shown = table.rename(columns=str)
    if shown.shape[1] > _FEW_LAYERS:
        shown.columns = pd.Index([str(c) if int(c) % 5 == 0 else "" for c in table.columns])
    full, height = float(np.nanmax(table)), 1.1 + 0.3 * len(table)
    return cell_map(shown, lambda _: "", full=full, labels=("layer", ""), height=height)


def conflict_by_layer(modules: pd.DataFrame) -> pd.DataFrame:
    """Return the sign conflict by kind of module (rows) and layer (columns), mean over pairs.

    Pairs and modules are weighted by the product of the updates' norms; modules outside of layers
    are left out.
    """
    found = modules["module"].map(lambda name: _LAYER.search(str(name)))
    kept = modules[found.notna()]
    if kept.empty:
        return pd.DataFrame()
    keys = [kept["module"].str.rpartition(".")[2], found[found.notna()].map(lambda m: int(m[1]))]
    weighted = (kept[_SHOWN] * kept["weight"]).groupby(keys).sum()
    return (weighted / kept["weight"].groupby(keys).sum()).unstack()


def most_conflict(contents: Contents) -> float:
    """Return the largest cell of `layer_map`; NaN where there is none."""
    table = conflict_by_layer(contents.module_interference)
    return float(np.nanmax(table)) if not table.empty else np.nan


def rows_of_harm(contents: Contents) -> str:
    """Say on how many rows of a cluster the harm was measured."""
    counts = sorted({int(n) for n in contents.cross["n"]})
    return " to ".join(str(n) for n in dict.fromkeys([*counts[:1], *counts[-1:]]))


def _by_cluster(
    table: pd.DataFrame,
    write: Callable[[float], str],
    *,
    full: float,
    labels: tuple[str, str],
    sure: pd.DataFrame | None = None,
) -> Figure:
    shown = table.rename(index=cluster_number, columns=cluster_number)
    height = 1.4 + 0.34 * len(table)
    return cell_map(shown, write, full=full, labels=labels, height=height, sure=sure)


def shared_energy(contents: Contents) -> Figure | None:
    """Draw the share of the joint factors' energy that clusters share, by layer."""
    layers = _by_layer(contents.shared_structure)
    if layers.empty:
        return None
    figure, axes = half_page(3.2)
    axes.plot(layers.index, layers.to_numpy(), "o-", ms=3.5, color=LIGHT["accent"])
    axes.set(xlabel="layer", ylabel="shared energy", ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{percent(y)} %"))
    return figure


def shared_facts(contents: Contents) -> list[Fact]:
    """Return the shared share of the energy, the spread of loadings and the core consistency."""
    table = contents.shared_structure
    if table.empty or not table["energy"].sum():
        return []
    weight = table["energy"] / table["energy"].sum()
    k = contents.manifest.clustering.k
    facts = [
        Fact("shared energy", f"{percent(float((table['shared'] * weight).sum()), 1)} %", "of C²"),
        Fact("spread of a component", number(float((table["spread"] * weight).sum()), 2),
             f"clusters, of {k}"),
    ]  # fmt: skip
    consistency = table["core_consistency"].dropna()
    if consistency.empty:
        facts.append(Fact("core consistency", "not defined", "the CP rank exceeds K"))
    else:
        facts.append(Fact("core consistency", f"{number(consistency.median())} %", "median module"))
    return facts


def correlations(contents: Contents) -> list[Correlation]:
    """Correlate each cluster's mean interference with the others and the primary's recovery."""
    names = _names(contents)
    rows = contents.recovery
    own = rows[rows["method"] == contents.primary].set_index("cluster")["recovery"]
    clusters = {name: str(cluster_number(name)) for name in names}
    measured = [name for name in names if not pd.isna(own.get(clusters[name], np.nan))]
    found = []
    for measure, label in _MEASURES.items() if names else ():
        table = square(contents.interference, names, measure)
        means = table.mean(axis=1)[measured]
        shares = pd.Series([own[clusters[name]] for name in measured], index=measured, dtype=float)
        rho = means.rank().corr(shares.rank()) if len(measured) > 2 else np.nan
        mean = float(contents.interference[measure].mean())
        found.append(
            Correlation(label, mean, float(rho), len(measured), _foretold(contents, measure))
        )
    return [one for one in found if not np.isnan(one.mean)]


def _foretold(contents: Contents, measure: str) -> Foretold:
    rows = contents.harm[contents.harm["measure"] == measure].to_dict("records")
    if not rows:
        return Foretold()
    return Foretold(**{name: rows[0][name] for name in ("rho", "low", "high", "p", "n")})


def _names(contents: Contents) -> list[str]:
    pairs = contents.interference
    names = {*pairs["first"], *pairs["second"]}
    return [n for k in range(contents.manifest.clustering.k) if (n := cluster_name(k)) in names]


def _by_layer(table: pd.DataFrame) -> pd.Series:
    """Return the shared share of energy per layer: the first number in a module's path."""
    found = table["module"].map(lambda module: _LAYER.search(str(module)))
    kept = table[found.notna()]
    layer = found[found.notna()].map(lambda match: int(match[1]))
    weighted = (kept["shared"] * kept["energy"]).groupby(layer).sum()
    return weighted / kept["energy"].groupby(layer).sum()
