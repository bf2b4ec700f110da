"""The common look of the figures: style, size, user texts and named bars."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclora.report.notation import shorten
from tclora.report.palette import LIGHT

DASHED = (0, (3, 3))

_WIDTH = 5.5  # inches: half of the report's page
_LABEL_LENGTH = 30
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LIGHT["mark"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlecolor": LIGHT["ink"],
    "figure.dpi": 150,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["soft"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["mark"],
    "ytick.color": LIGHT["mark"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
}


def half_page(height: float) -> tuple[Figure, Axes]:
    """Return a figure of half the page's width and `height` inches, with one pair of axes."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def bar_chart(n_bars: int) -> tuple[Figure, Axes]:
    """Return a figure of half the page's width, tall enough for `n_bars` horizontal bars."""
    return half_page(1.0 + 0.33 * n_bars)


def name_bars(axes: Axes, names: Sequence[str], values: Sequence[str]) -> None:
    """Write names left and values right of horizontal bars, from bottom to top."""
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    beside = axes.get_yaxis_transform()
    for place, value in enumerate(values):
        axes.text(1.02, place, value, transform=beside, va="center", color=LIGHT["soft"])


def plain(text: str) -> str:
    """Shorten a user's text and keep matplotlib from reading it as mathematics or as private."""
    return shorten(text, _LABEL_LENGTH).replace("$", r"\$").replace("_", "\u200b_", text[:1] == "_")
