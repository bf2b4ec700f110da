"""The plot of a study: estimates with their intervals, one line each."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tclora.report.canvas import STYLE, bar_chart, name_bars
from tclora.report.notation import number
from tclora.report.palette import LIGHT


def draw_estimates(names: Sequence[str], estimates: NDArray[np.float64], label: str) -> Figure:
    """Draw estimates with their intervals, the first at the bottom.

    Parameters
    ----------
    names : sequence of n str
        What each is an estimate of.
    estimates : ndarray, shape (n, 3)
        Value, low and high.
    label : str
        Of the axis.
    """
    with mpl.rc_context(STYLE):
        figure, axes = bar_chart(len(names))
        places = np.arange(len(names))
        values, low, high = estimates.T
        axes.hlines(places, low, high, color=LIGHT["bar"], lw=2)
        axes.plot(values, places, "o", ms=5, color=LIGHT["accent-bar"])
        name_bars(axes, names, [number(value, 3) for value in values])
        axes.set(xlabel=label)
    return figure
