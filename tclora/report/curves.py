"""Line figures: training loss against steps, explained variance against the CP rank."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from tclora.library.contents import Contents
from tclora.library.names import JOINT, cluster_number
from tclora.library.records import Factors
from tclora.report.canvas import DASHED, half_page
from tclora.report.notation import number, percent
from tclora.report.palette import LIGHT, cluster_colour

_COLUMNS = 5  # panels beside each other
_WINDOWS = 15  # running means per curve


def loss_curves(contents: Contents) -> Figure | None:
    """Draw the training loss of each adapter, smoothed over its steps, the joint LoRA behind.

    Diamonds are its loss on rows held out from training, where there are any.
    """
    logs = contents.losses
    names = [name for name in logs if name != JOINT] or list(logs)
    if not names:
        return None
    columns = min(_COLUMNS, len(names))
    n_rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 * columns + 0.4, 1.7 * n_rows + 0.35), layout="constrained")
    panels = list(figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        if JOINT in logs:
            _draw_loss(axes, logs[JOINT], LIGHT["mark"], raw=False)
        _draw_loss(axes, logs[name], _adapter_colour(name), raw=True)
        axes.set_title(f"{name} · {number(len(logs[name]))} steps", loc="left")
        axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.tick_params(labelbottom=True)  # the panel below may be hidden
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("share of the steps (%)", fontsize=9, color=LIGHT["soft"])
    figure.supylabel("loss (nats per token)", fontsize=9, color=LIGHT["soft"])
    return figure


def explained_variance(contents: Contents) -> Figure | None:
    """Draw explained variance against the CP rank: the whole, and the spread over modules."""
    curve = contents.explained_variance
    overall = curve[curve["module"] == "overall"].sort_values("rank")
    if overall.empty:
        return None
    ranks = overall["rank"].tolist()
    figure, axes = half_page(3.5)
    _draw_spread(axes, curve[curve["module"] != "overall"])
    axes.plot(
        ranks, overall["explained_variance"], "o-", ms=4, color=LIGHT["accent"], label="all modules"
    )
    _mark_choice(axes, contents.manifest.factors)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="CP rank R", ylabel="explained variance", ylim=(0, 1.03))
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{percent(y)} %"))
    axes.legend(loc="upper left")
    return figure


def _draw_loss(axes: Axes, log: pd.DataFrame, colour: str, *, raw: bool) -> None:
    share = np.arange(1, len(log) + 1) / len(log)
    window = max(1, len(log) // _WINDOWS)
    if raw:
        axes.plot(share, log["loss"], color=colour, lw=0.6, alpha=0.4)
    axes.plot(share, log["loss"].rolling(window, min_periods=1).mean(), color=colour, lw=1.5)
    if raw and "validation_nll" in log:
        axes.plot(share, log["validation_nll"], "D", color=LIGHT["ink"], ms=2.5)


def _draw_spread(axes: Axes, modules: pd.DataFrame) -> None:
    """Fill the band from the 10th to the 90th percentile of the modules at each rank."""
    by_rank = modules.groupby("rank")["explained_variance"]
    low, high = by_rank.quantile(0.1), by_rank.quantile(0.9)
    if not low.empty:
        axes.fill_between(
            low.index, low, high, color=LIGHT["bar"], alpha=0.5, lw=0, label="80 % of modules"
        )


def _mark_choice(axes: Axes, factors: Factors) -> None:
    rank, share = factors.rank, factors.explained_variance
    axes.axvline(rank, color=LIGHT["ink"], lw=0.9, ls=DASHED)
    label = f"chosen R = {rank}: {percent(share, 1)} %"
    axes.plot(rank, share, "D", ms=6.5, color=LIGHT["ink"], label=label)


def _adapter_colour(name: str) -> str:
    cluster = cluster_number(name)
    return LIGHT["mark"] if cluster is None else cluster_colour(cluster)
