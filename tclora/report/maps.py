"""Tables of numbers as shaded cells."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tclora.report.canvas import half_page, plain
from tclora.report.palette import LIGHT


def cell_map(
    table: pd.DataFrame,
    write: Callable[[float], str],
    *,
    full: float,
    labels: tuple[str, str],
    height: float,
    sure: pd.DataFrame | None = None,
) -> Figure:
    """Draw a table: the darker a cell the larger its value, empty where there is none.

    Parameters
    ----------
    table : DataFrame
        Its index and its columns are the names at the axes.
    write : callable
        Writes a value into its cell; nothing is written where it gives an empty text.
    full : float
        The value of the darkest cells; its negative has the darkest of the other colour.
    labels : tuple of str
        What columns and rows are.
    height : float
        Of the figure, inches.
    sure : DataFrame of bool, optional
        Cells whose numbers are in bold type; the same shape.
    """
    bold = np.zeros(table.shape, dtype=bool) if sure is None else sure.to_numpy(bool)
    figure, axes = half_page(height)
    _frame(axes, [str(name) for name in table.columns], [str(name) for name in table.index])
    axes.set(xlabel=labels[0], ylabel=labels[1])
    for (row, column), value in np.ndenumerate(table.to_numpy(float)):
        if not np.isnan(value):
            colour = LIGHT["accent-bar" if value >= 0 else "c1"]
            depth = min(1.0, abs(value) / full) if full else 0.0
            corner = (column - 0.48, row - 0.46)  # no image: the report's policy allows none
            axes.add_patch(Rectangle(corner, 0.96, 0.92, color=colour, alpha=depth))
            weight = "bold" if bold[row, column] else "normal"
            axes.text(
                column, row, write(value), ha="center", va="center", fontsize=7.5, weight=weight
            )
    return figure


def _frame(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns])
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
