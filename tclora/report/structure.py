"""What clusters share and where they collide: energy per layer, interference, and recovery."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from tclora.library.contents import Contents
from tclora.library.names import cluster_number
from tclora.report.canvas import half_page, plain
from tclora.report.notation import number, percent
from tclora.report.overview import Fact
from tclora.report.palette import LIGHT

_MEASURES = {
    "cosine": "cosine of the updates",
    "input_overlap": "overlap of the inputs read",
    "output_overlap": "overlap of the outputs written",
    "sign_conflict": "share of opposite signs",
}
_MAX_NUMBERED = 10  # clusters whose cells still have room for a number
_FEWEST = 3  # clusters whose ranks can correlate
_UNIQUE = 50  # percent of core consistency, below which a model is not trilinear


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ between one measure of interference and recovery, over `n` clusters."""

    measure: str
    rho: float
    n: int


def interference_maps(contents: Contents) -> Figure | None:
    """Draw each measure of interference between every two clusters."""
    if contents.pairs.empty:
        return None
    names = _names(contents.pairs)
    figure = Figure(figsize=(5.5, 5.7), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, _MEASURES.items(), strict=True):
        axes.set_title(title)
        _draw_map(axes, _square(contents.pairs, measure, names), names)
    return figure


def shared_energy(contents: Contents) -> Figure | None:
    """Draw the energy of every layer's components, what is shared apart from clusters' own."""
    total = contents.components["energy"].sum()
    if not total:
        return None
    parts = contents.components.assign(
        layer=contents.components["module"].map(_layer),
        common=contents.components["shared"] * contents.components["energy"] / total,
        energy=contents.components["energy"] / total,
    )
    layers = parts.groupby("layer")[["energy", "common"]].sum()
    own = layers["energy"] - layers["common"]
    places = np.arange(len(layers))
    figure, axes = half_page(3.5)
    axes.bar(places, layers["common"], color=LIGHT["accent-bar"], label="shared by clusters")
    axes.bar(places, own, bottom=layers["common"], color=LIGHT["bar"], label="one cluster's own")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _layer_label(layers.index, x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{percent(y)} %"))
    axes.set(xlabel="layer", ylabel="share of all components' energy")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, 1.25 * float(layers["energy"].max()))  # room for the legend
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left", ncols=2)
    return figure


def structure_facts(contents: Contents) -> list[Fact]:
    """Return how much is shared, by how many clusters, and how unique the components are."""
    facts = []
    energy = contents.components["energy"]
    if total := energy.sum():
        share = (contents.components["shared"] * energy).sum() / total
        spread = (contents.components["spread"] * energy).sum() / total
        facts.append(Fact("shared energy", f"{percent(share, 1)} %", "of the components"))
        note = "clusters per component, weighted by energy; 1: one cluster's own"
        facts.append(Fact("mean spread", number(spread, 2), note))
    measured = contents.consistency.dropna(subset="core_consistency")
    if not measured.empty:
        values = measured["core_consistency"]
        median, rank = f"{number(values.median())} %", int(measured["core_rank"].max())
        facts.append(Fact("core consistency", median, f"median module, at rank {rank}"))
        low = int((values < _UNIQUE).sum())
        note = f"of {len(values)} modules below {_UNIQUE} %"
        facts.append(Fact("not trilinear", number(low), note, warn=2 * low > len(values)))
    return facts


def interference_correlations(contents: Contents) -> list[Correlation]:
    """Correlate each cluster's mean interference with the primary merge's recovery of it.

    Returns
    -------
    list of Correlation
        One per measure; empty where fewer than three clusters have both.
    """
    rows = contents.recovery[contents.recovery["method"] == contents.primary]
    recovery = rows.set_index("cluster")["recovery"].dropna()
    found = []
    for measure, title in _MEASURES.items():
        both = pd.DataFrame({"mean": _mean_with_others(contents.pairs, measure)})
        both = both.join(recovery, how="inner")
        ranks = both.rank()
        if len(both) >= _FEWEST and (ranks.nunique() > 1).all():
            rho = float(np.corrcoef(ranks["mean"], ranks["recovery"])[0, 1])
            found.append(Correlation(title, rho, len(both)))
    return found


def _mean_with_others(pairs: pd.DataFrame, measure: str) -> pd.Series:
    """Return each cluster's mean over its pairs, by its number as text, as in the recovery."""
    sides = [pairs.set_index(side)[measure] for side in ("first", "second")]
    means: pd.Series = pd.concat(sides).groupby(level=0).mean()
    means.index = pd.Index([_short(name) for name in means.index], dtype=object)
    return means


def _draw_map(axes: Axes, values: NDArray[np.float64], names: list[str]) -> None:
    """Draw a K × K map, darkest at its largest magnitude; negative values in another colour."""
    K = len(names)
    largest = np.nanmax(np.abs(values)) or 1.0
    axes.set(xlim=(-0.5, K - 0.5), ylim=(K - 0.5, -0.5), aspect="equal")
    places = range(0, K, -(-K // 16))
    labels = [plain(_short(names[place])) for place in places]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        colour = LIGHT["worst"] if value < 0 else LIGHT["accent-bar"]
        corner, strength = (column - 0.48, row - 0.48), abs(value) / largest
        axes.add_patch(Rectangle(corner, 0.96, 0.96, color=colour, alpha=strength, lw=0))
        if K <= _MAX_NUMBERED:
            text = number(value, 2).replace("0.", ".", 1)
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5)


def _square(pairs: pd.DataFrame, measure: str, names: list[str]) -> NDArray[np.float64]:
    """Return the symmetric (K, K) values of a measure, NaN on the diagonal."""
    values = np.full((len(names), len(names)), np.nan)
    for first, second, value in pairs[["first", "second", measure]].itertuples(index=False):
        i, j = names.index(first), names.index(second)
        values[i, j] = values[j, i] = value
    return values


def _names(pairs: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys([*pairs["first"], *pairs["second"]]))


def _short(name: str) -> str:
    cluster = cluster_number(name)
    return name if cluster is None else str(cluster)


def _layer(module: str) -> int:
    """Return the number of a module's layer, -1 outside the layers."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(found[1]) if found else -1


def _layer_label(layers: pd.Index, place: float) -> str:
    if place != round(place) or not 0 <= place < len(layers):
        return ""
    return "other" if layers[round(place)] < 0 else str(layers[round(place)])
