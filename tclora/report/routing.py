"""Where the router sends held-out prompts: weights per task, one example of each, its quality."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tclora.library.contents import Contents
from tclora.report.canvas import plain
from tclora.report.notation import number, percent, shorten
from tclora.report.overview import Fact
from tclora.report.palette import LIGHT

STATIC = "static"
_SPLITS = {"test": "", "ood": " (OOD)", "composition": " (composition)"}
_MAX_TASKS = 24
_PROMPT_LENGTH = 90
_LEAST_SHARE = 0.005  # is drawn
_COLUMNS = {"id", "prompt", "task", "split", "cluster", "true", "nearest", "known", "similarity",
            "confidence"}  # fmt: skip


@dataclass(frozen=True)
class RoutedPrompt:
    """One example prompt of a task: the share of every cluster, the static merge last."""

    task: str
    prompt: str
    similarity: float
    shares: list[float]


def destinations(contents: Contents) -> list[str]:
    """Return the adapters that prompts can be routed to, and the static merge."""
    return [*(name for name in contents.routing.columns if name not in _COLUMNS), STATIC]


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
    axes.set_xticks(range(len(names)), [plain(n.removeprefix("cluster-")) for n in names])
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
    info = contents.manifest.get("routed") or {}
    facts = []
    if "accuracy" in info:
        facts.append(
            Fact("routing accuracy", f"{percent(info['accuracy'], 1)} %", "in-domain prompts")
        )
        error = number(info["calibration_error"], 3)
        facts.append(Fact("calibration error", error, "0: confidence is accuracy"))
    facts += [
        Fact(f"coverage, {split}", f"{percent(info[f'coverage_{split}'])} %", "routed prompts")
        for split in _SPLITS
        if f"coverage_{split}" in info
    ]
    if "bytes_share" in info:
        share = f"{percent(info['bytes_share'], 1)} %"
        facts.append(Fact("bytes", share, "of the separate adapters"))
    return facts


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
    """Return (n, K + 1) shares: the routing weights, or all to the static merge."""
    known = rows["known"].to_numpy(float)[:, None]
    return np.hstack([rows[names[:-1]].to_numpy(float) * known, 1 - known])
