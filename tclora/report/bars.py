"""Bar figures: rows per cluster, recovery per method, bytes per form of the library."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from tclora.library.contents import Contents
from tclora.library.names import JOINT, ROUTED
from tclora.report.canvas import DASHED, bar_chart, name_bars
from tclora.report.methods import Estimate, label, merges, recoveries
from tclora.report.notation import number, percent, size
from tclora.report.palette import LIGHT, cluster_colour

_BAR = 0.62  # height of a bar, in rows
_LOWEST_RECOVERY = -0.5  # where the axis is cut; the number beside the bar is not
_WORST: dict[str, Any] = {"marker": "D", "ms": 5, "ls": "none", "color": LIGHT["worst"]}


def cluster_sizes(contents: Contents) -> Figure | None:
    """Draw the number of training rows per cluster; -1 is noise that was dropped."""
    clusters = contents.training_rows["cluster"]
    if clusters.empty:
        return None
    counts = clusters.value_counts().sort_index(ascending=False)
    ids = [int(cluster) for cluster in counts.index.tolist()]
    figure, axes = bar_chart(len(ids))
    axes.barh(range(len(ids)), counts.tolist(), _BAR, color=[cluster_colour(c) for c in ids])
    names = ["dropped" if cluster < 0 else f"cluster {cluster}" for cluster in ids]
    name_bars(axes, names, [number(count) for count in counts])
    axes.set(xlim=(0, counts.max()), xticks=[])
    return figure


def recovery(contents: Contents) -> Figure | None:
    """Draw each method's mean recovery with its interval, and its worst cluster."""
    means = recoveries(contents, "mean")
    names = [name for name in [JOINT, *reversed(merges(contents))] if name in means]
    if not names:
        return None
    worst = recoveries(contents, "worst")
    floor, top = _recovery_limits([*means.values(), *worst.values()])
    figure, axes = bar_chart(len(names) + 1)
    for place, name in enumerate(names):
        colour = LIGHT["accent-bar" if name == contents.primary else "bar"]
        _draw_mean(axes, place, means[name], floor, colour)
        if name in worst and worst[name].value > floor:
            axes.plot(worst[name].value, place, **_WORST)
    for value in (0, 1):
        axes.axvline(value, color=LIGHT["ink"], lw=0.9, ls=DASHED)
    name_bars(axes, [label(m) for m in names], [f"{percent(means[m].value)} %" for m in names])
    axes.set(xlim=(floor, top), xlabel="0 %: base model, 100 %: own adapters")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{percent(x)} %"))
    interval = Line2D([], [], color=LIGHT["ink"], lw=1.3)
    handles = [interval, Line2D([], [], **_WORST)]
    figure.legend(
        handles, ["interval of the mean", "worst cluster"], loc="outside lower right", ncols=2
    )
    return figure


def storage(contents: Contents) -> Figure | None:
    """Draw the bytes of the separate adapters, the shared factors and each merge, best on top."""
    stored = _stored(contents)
    names = list(reversed(stored))
    if not names:
        return None
    figure, axes = bar_chart(len(names))
    shared = {"factors", ROUTED, f"merged {contents.primary}"}
    colours = [LIGHT["accent-bar" if name in shared else "bar"] for name in names]
    axes.barh(range(len(names)), [stored[name] for name in names], _BAR, color=colours)
    name_bars(axes, names, [size(stored[name]) for name in names])
    axes.set(xlim=(0, max(stored.values())), xticks=[])
    return figure


def _stored(contents: Contents) -> dict[str, int]:
    """Return the bytes of every form of the library, the merges from best to worst."""
    storage, merged = contents.manifest.storage, contents.manifest.merges
    forms = {
        "separate adapters": storage.separate_adapters,
        "factors": storage.factors,
        ROUTED: storage.routed,
    }
    forms |= {f"merged {name}": merged[name].bytes for name in merges(contents) if name in merged}
    return {name: count for name, count in forms.items() if count}


def _recovery_limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return the ends of the recovery axis: all of 0 to 1, and what lies beyond within reason."""
    values = np.array(estimates)  # (n, value and ends)
    floor = max(_LOWEST_RECOVERY, min(0.0, float(np.nanmin(values))))
    return floor - 0.03, max(1.0, float(np.nanmax(values))) + 0.03


def _draw_mean(axes: Axes, place: int, mean: Estimate, floor: float, colour: str) -> None:
    axes.barh(place, max(mean.value, floor), _BAR, color=colour)
    axes.hlines(place, max(mean.low, floor), max(mean.high, floor), color=LIGHT["ink"], lw=1.3)
    if mean.value < floor:
        axes.plot(floor + 0.025, place, "<", color=LIGHT["ink"], ms=5)
