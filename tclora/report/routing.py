"""Where the router sends held-out prompts: weights per task, one example of each, its quality."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tclora.library.contents import Contents
from tclora.library.names import cluster_number
from tclora.report.canvas import plain
from tclora.report.notation import number, percent, shorten
from tclora.report.overview import Fact
from tclora.report.palette import LIGHT

FALLBACK = "fallback"
_SPLITS = {"test": "", "ood": " (OOD)", "composition": " (composition)"}
_MAX_TASKS = 24
_PROMPT_LENGTH = 90
_LEAST_SHARE = 0.005  # is drawn
_COLUMNS = {"id", "prompt", "task", "split", "cluster", "true", "nearest", "known", "similarity",
            "confidence", "belonging"}  # fmt: skip


@dataclass(frozen=True)
class RoutedPrompt:
    """One example prompt of a task: the share of every cluster, the fallback last."""

    task: str
    prompt: str
    similarity: float
    shares: list[float]


def destinations(contents: Contents) -> list[str]:
    """Return the adapters that prompts can be routed to, and the fallback."""
    return [*(name for name in contents.routing.columns if name not in _COLUMNS), FALLBACK]


def routing(contents: Contents) -> Figure | None:
    """Draw the mean routing weights of every task's held-out prompts."""
    groups = list(_groups(contents.routing))
    if not groups:
        return None
    names = destinations(contents)
    shares = np.array([_shares(rows, names).mean(axis=0) for _, rows in groups])
    figure = Figure(figsize=(5.5, 1.1 + 0.27 * len(groups)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(groups) - 0.5, -0.5))
    axes.set_yticks(range(len(groups)), [plain(task) for task, _ in groups])
    axes.set_xticks(range(len(names)), [plain(_short(name)) for name in names])
    axes.tick_params(length=0, labelcolor=LIGHT["ink"])
    axes.set_xlabel("cluster")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), share in np.ndenumerate(shares):
        if share >= _LEAST_SHARE:
            corner = (column - 0.48, row - 0.46)
            axes.add_patch(Rectangle(corner, 0.96, 0.92, color=LIGHT["accent-bar"], alpha=share))
            axes.text(column, row, percent(share), ha="center", va="center", fontsize=7.5)
    return figure


def _short(name: str) -> str:
    """Return the number of a cluster's adapter, and any other name as it is."""
    cluster = cluster_number(name)
    return name if cluster is None else str(cluster)


def short_destinations(contents: Contents) -> list[str]:
    """Return `destinations`, the clusters by their numbers alone."""
    return [_short(name) for name in destinations(contents)]


def routed_prompts(contents: Contents) -> list[RoutedPrompt]:
    """Return the first prompt by id of every task, with its routing."""
    names = destinations(contents)
    examples = []
    for task, rows in _groups(contents.routing):
        first = rows.sort_values("id").head(1)
        shares = _shares(first, names)[0].tolist()
        prompt = shorten(first["prompt"].iloc[0], _PROMPT_LENGTH)
        examples.append(RoutedPrompt(task, prompt, float(first["similarity"].iloc[0]), shares))
    return examples


def router_quality(contents: Contents) -> list[Fact]:
    """Return accuracy, calibration and coverage of the router, and what the library costs."""
    routed = contents.manifest.routed
    if routed is None:
        return []
    facts = []
    if routed.accuracy is not None:
        right = f"{percent(routed.accuracy, 1)} %"
        facts.append(Fact("routing accuracy", right, "in-domain prompts"))
    if routed.calibration_error is not None:
        error = number(routed.calibration_error, 3)
        facts.append(Fact("calibration error", error, "0: confidence is accuracy"))
    facts += [
        Fact(f"coverage, {split}", f"{percent(share)} %", "routed prompts")
        for split, share in routed.coverage.items()
    ]
    if routed.abstain_at is not None and routed.fallback_spread is not None:
        note = "nearness of prompts, 0 to 1; below 0 the fallback is hardly used"
        facts.append(Fact("half fallback at", number(routed.abstain_at, 2), note))
        spread = number(routed.fallback_spread, 2)
        scale = number(routed.fallback_scale or 1.0, 2)
        facts.append(Fact("fallback", f"spread {spread}, scale {scale}", "1, 1: an average"))
    if routed.probes_loss is not None:
        never, always = number(routed.probes_never or 0, 3), number(routed.probes_always or 0, 3)
        note = f"never abstaining {never}, always {always}; training rows, reworded and left out"
        facts.append(Fact("NLL of the probes", number(routed.probes_loss, 3), note))
    share = f"{percent(routed.bytes_share, 1)} %"
    return [*facts, Fact("bytes", share, "of the separate adapters")]


def _groups(routing: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each task, or cluster where there are no labels, and its rows."""
    unnamed = "cluster " + routing["nearest"].astype(str)
    labelled = routing.assign(group=routing["task"].fillna(unnamed))
    count = 0
    for split, suffix in _SPLITS.items():
        part = labelled[labelled["split"] == split]
        for task, rows in part.groupby("group", sort=True):
            if count < _MAX_TASKS:
                yield f"{task}{suffix}", rows
            count += 1


def _shares(rows: pd.DataFrame, names: list[str]) -> NDArray[np.float64]:
    """Return (n, K + 1) shares: the routing weights times belonging, the rest to the fallback."""
    belonging = rows["belonging"].to_numpy(float)[:, None]
    return np.hstack([rows[names[:-1]].to_numpy(float) * belonging, 1 - belonging])
