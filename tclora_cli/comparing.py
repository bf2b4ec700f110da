"""``tclora compare``: two results paired item by item."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tclora.errors import ConfigError, DataError
from tclora.evaluate.compare import METRICS, Comparison, compare_items, result_items
from tclora.evaluate.tables import ITEMS
from tclora.library.layout import Layout
from tclora.report.notation import MISSING
from tclora_cli.tables import print_whole


def print_comparison(
    specs: tuple[str, str],
    tasks: Sequence[str],
    metric: str,
    confidence: float,
    seed: int,
    console: Console,
) -> None:
    """Print the comparison of two results, of all items and of every task."""
    if metric not in METRICS:
        raise ConfigError(f"--metric must be one of {METRICS}, got {metric!r}")
    first, second = (result_items(*_open(spec), tasks) for spec in specs)
    found = compare_items(first, second, metric, names=specs, confidence=confidence, seed=seed)
    title = f"{metric}: {specs[0]} against {specs[1]}, {confidence:.0%} intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    columns = ("task", "n", "seeds", "first", "second", "difference", "interval", "wins", "losses",
               "ties")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for line in found:
        table.add_row(*_cells(line))
    print_whole(table, console)


def _open(spec: str) -> tuple[pd.DataFrame, str]:
    """Return the items of a folder, and the method that is named behind the colon."""
    folder, colon, method = spec.rpartition(":")
    if not colon:
        raise ConfigError(f"a result must be FOLDER:METHOD, got {spec!r}")
    places = [Path(folder) / ITEMS, Layout(Path(folder)).evaluation.items]
    for place in places:
        if place.is_file():
            return pd.read_parquet(place), method
    raise DataError(
        f"{folder!r} must be a folder of `tclora eval` or a library with an evaluation, "
        "but holds no measured items"
    )


def _cells(line: Comparison) -> list[str]:
    figures = [f"{value:.4f}" for value in (line.first, line.second)]
    difference = f"{line.difference:+.4f}"
    known = not math.isnan(line.low)
    interval = rf"\[{line.low:+.4f}, {line.high:+.4f}]" if known else MISSING
    counts = map(str, (line.wins, line.losses, line.ties))
    return [line.task, str(line.n), str(line.seeds), *figures, difference, interval, *counts]
