"""The 2-D map of the training rows: colour is the cluster, marker the task."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tclora.library.contents import Contents
from tclora.report.canvas import half_page, plain
from tclora.report.palette import LIGHT, cluster_colour

MAP_POINTS = 2400  # more would only cover each other, and swell the file

_MARKERS = "osD^vPXph*"


def cluster_map(contents: Contents) -> Figure | None:
    """Draw the training rows, evenly thinned; tasks have markers where there are enough markers."""
    rows = contents.training_rows
    if rows.empty:
        return None
    rows = rows.iloc[:: -(-len(rows) // MAP_POINTS)]
    markers = task_markers(contents)
    figure, axes = half_page(4.6)
    for cluster in sorted(rows["cluster"].unique().tolist()):
        _draw_cluster(axes, rows[rows["cluster"] == cluster], cluster, markers)
    axes.set(xticks=[], yticks=[], xlabel="first principal axis", ylabel="second principal axis")
    if markers:
        figure.legend(handles=_marker_handles(markers), loc="outside lower center", ncols=3)
    return figure


def task_markers(contents: Contents) -> dict[str, str]:
    """Return the marker of each training task; none where there are more tasks than markers."""
    tasks = sorted(contents.training_rows["task"].dropna().unique())
    return dict(zip(tasks, _MARKERS, strict=False)) if len(tasks) <= len(_MARKERS) else {}


def _draw_cluster(axes: Axes, rows: pd.DataFrame, cluster: int, markers: dict[str, str]) -> None:
    colour = cluster_colour(cluster)
    shapes = pd.Series([markers.get(task, "o") for task in rows["task"]], rows.index)
    for shape in sorted(shapes.unique()):
        points = rows[shapes == shape]
        axes.scatter(
            points["x"], points["y"], s=14, marker=shape, color=colour, alpha=0.75, linewidths=0
        )
    if cluster >= 0:
        box = {"boxstyle": "circle,pad=0.25", "fc": LIGHT["page"], "ec": colour, "lw": 1.8}
        x, y = rows["x"].median(), rows["y"].median()
        axes.text(
            x,
            y,
            str(cluster),
            color=LIGHT["ink"],
            weight="bold",
            ha="center",
            va="center",
            bbox=box,
        )


def _marker_handles(markers: dict[str, str]) -> list[Line2D]:
    return [
        Line2D([], [], ls="none", marker=marker, ms=4.5, color=LIGHT["soft"], label=plain(task))
        for task, marker in markers.items()
    ]
