"""What the adapters do to each other: interference of pairs, shared energy by layer."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tclora.library.contents import Contents
from tclora.library.names import cluster_name, cluster_number
from tclora.report.canvas import half_page, plain
from tclora.report.notation import number, percent
from tclora.report.overview import Fact
from tclora.report.palette import LIGHT

_MEASURES = {
    "cosine": "cosine of the updates",
    "input_overlap": "overlap of the directions read",
    "output_overlap": "overlap of the directions written",
    "sign_conflict": "share of the interaction that cancels",
}
_SHOWN = "sign_conflict"


@dataclass(frozen=True)
class Correlation:
    """How one measure of interference goes with recovery, over clusters."""

    measure: str
    mean: float  # over pairs
    rho: float  # Spearman's rank correlation with recovery; NaN where it is not defined
    n: int  # clusters


def interference(contents: Contents) -> Figure | None:
    """Draw how much of every two adapters' interaction cancels, K x K."""
    names = _names(contents)
    if not names:
        return None
    table = _square(contents.interference, names, _SHOWN)
    figure, axes = half_page(1.4 + 0.34 * len(names))
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    ticks = [plain(str(cluster_number(name))) for name in names]
    axes.set_xticks(range(len(names)), ticks)
    axes.set_yticks(range(len(names)), ticks)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set(xlabel="cluster", ylabel="cluster")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            corner = (column - 0.48, row - 0.46)  # no image: the report's policy allows none
            axes.add_patch(Rectangle(corner, 0.96, 0.92, color=LIGHT["accent-bar"], alpha=value))
            axes.text(column, row, percent(value), ha="center", va="center", fontsize=7.5)
    return figure


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
        table = pd.DataFrame(_square(contents.interference, names, measure), names, names)
        means = table.mean(axis=1)[measured]
        shares = pd.Series([own[clusters[name]] for name in measured], index=measured, dtype=float)
        rho = means.rank().corr(shares.rank()) if len(measured) > 2 else np.nan
        mean = float(contents.interference[measure].mean())
        found.append(Correlation(label, mean, float(rho), len(measured)))
    return found


def _names(contents: Contents) -> list[str]:
    pairs = contents.interference
    names = {*pairs["first"], *pairs["second"]}
    return [n for k in range(contents.manifest.clustering.k) if (n := cluster_name(k)) in names]


def _square(pairs: pd.DataFrame, names: list[str], measure: str) -> "np.ndarray":
    """Return a measure as a symmetric K x K array, NaN on the diagonal."""
    table = pd.DataFrame(np.nan, index=names, columns=names)
    for row in pairs.to_dict("records"):
        table.loc[row["first"], row["second"]] = row[measure]
        table.loc[row["second"], row["first"]] = row[measure]
    return table.to_numpy(float)


def _by_layer(table: pd.DataFrame) -> pd.Series:
    """Return the shared share of energy per layer: the first number in a module's path."""
    found = table["module"].map(lambda module: re.search(r"\.(\d+)\.", str(module)))
    kept = table[found.notna()]
    layer = found[found.notna()].map(lambda match: int(match[1]))
    weighted = (kept["shared"] * kept["energy"]).groupby(layer).sum()
    return weighted / kept["energy"].groupby(layer).sum()
