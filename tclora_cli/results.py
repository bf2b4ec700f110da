"""What a run prints at its end: the method table and where everything is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, OWN
from tclora_cli.tables import print_whole

Row = Mapping[Any, Any]
_SPLITS = {"test": "in-domain", "ood": "OOD", "composition": "composition"}


def print_results(outcome: Mapping[str, str], console: Console, *, finished: bool) -> None:
    """Print the places of all results, and the method table of a run that went to its end."""
    library = Path(outcome["library"])
    if finished and Layout(library).evaluation.summary.exists():
        print_whole(method_table(library), console)
    for label, place in _places(outcome, library, finished):
        console.print(f"{label:<15} {place}", highlight=False, soft_wrap=True, markup=False)


def method_table(library: Path) -> Table:
    """Table of methods: NLL and accuracy per kind of task, recovery with its interval.

    A cell is one line where there is room, and is broken before its interval where there is not:
    intervals hold no space. Names of methods are never cut.
    """
    tables = Layout(library).evaluation
    summary, recovery = pd.read_parquet(tables.summary), pd.read_parquet(tables.recovery)
    overall = {
        (row["method"], row["split"]): row
        for row in summary[summary["group_kind"] == "all"].to_dict("records")
    }
    splits = [split for split in _SPLITS if split in set(summary["split"])]
    seeds = int(summary["seeds"].max())
    several = f", over {seeds} training seeds" if seeds > 1 else ""
    title = f"NLL per response token, and accuracy below it, with intervals{several}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for split in splits:
        n = int(summary[summary["split"] == split]["n"].max())
        table.add_column(f"{_SPLITS[split]}\nn={n}", justify="right")
    for column in ("recovery", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    shares = {(row["method"], row["cluster"]): row for row in recovery.to_dict("records")}
    for method in summary["method"].unique():
        cells = [_cell(overall, method, split) for split in splits]
        table.add_row(method, *cells, *_recovery_cells(shares, method))
    return table


def _cell(overall: Mapping[tuple[str, str], Row], method: str, split: str) -> str:
    row = overall.get((method, split))
    if row is None:
        return "-"
    lines = [
        f"{row[metric]:.{digits}f} [{row[f'{metric}_low']:.2f},{row[f'{metric}_high']:.2f}]"
        for metric, digits in (("nll", 3), ("accuracy", 2))
        if not pd.isna(row[metric])
    ]
    return "\n".join(lines)


def _recovery_cells(shares: Mapping[tuple[str, str], Row], method: str) -> tuple[str, str]:
    if (method, "mean") not in shares:
        reference = {BASE: "0%", OWN: "100%"}.get(method, "-")
        return reference, reference
    mean, worst = shares[method, "mean"], shares[method, "worst"]
    if pd.isna(mean["recovery"]):
        return "undefined", "undefined"
    interval = f"[{100 * mean['low']:.0f},{100 * mean['high']:.0f}]"
    return f"{mean['recovery']:.0%}\n{interval}", f"{worst['recovery']:.0%}\nn={worst['n']}"


def _places(
    outcome: Mapping[str, str], library: Path, finished: bool
) -> list[tuple[str, Path | str]]:
    places: list[tuple[str, Path | str]] = [("library", library)]
    if finished:
        layout = Layout(library)
        places.append(("report", layout.report))
        places += [("merged adapter", path) for path in sorted(layout.merges.glob("*"))]
    if finished and (url := read_manifest(library).config.get("publish_to")):
        places.append(("published", f"{url}/{library.name}"))
    places.append(("MLflow store", outcome["mlflow_uri"]))
    places.append(("MLflow run", f"{outcome['mlflow_run']} (open it: tclora ui)"))
    return places
