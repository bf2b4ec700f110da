"""Tables that compare methods: accuracy and NLL per task, and recovery per cluster.

A table has the references (base, own, joint) apart from the merges; the best merge of each column
is marked, and so are those that are not told apart from it (`tclora.evaluate.winners`).
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from tclora.library.contents import Contents
from tclora.report.methods import label, merges, references
from tclora.report.notation import MISSING, interval, number, percent

SPLITS = {
    "test": ("In-domain", "held-out rows of the training tasks"),
    "ood": ("Out-of-domain", "tasks that no adapter was trained on"),
    "composition": ("Composition", "rows that need skills of several tasks at once"),
}
_METRICS = ("accuracy", "accuracy_norm", "nll")
_SHARES = {
    "accuracy": "Accuracy (%)",
    "accuracy_norm": "Accuracy of choices by log-likelihood per character (%)",
}
_NARROW = 4  # columns


@dataclass(frozen=True)
class Cell:
    """One measurement: what is printed, its interval (or rows), and what sorts and ranks it."""

    text: str = MISSING
    interval: str = ""
    value: float | None = None
    best: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Column:
    """One group of items: its name and how many items it has (empty if that is not known)."""

    name: str
    count: str = ""


@dataclass(frozen=True)
class Row:
    """One method and its cells, in the order of the table's columns."""

    method: str
    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A comparison of methods (rows) over groups of items (columns)."""

    title: str
    columns: list[Column]
    references: list[Row]
    merges: list[Row]


@dataclass(frozen=True)
class SplitComparison:
    """The comparison on one split; `omitted` is the reason where there is none."""

    title: str
    subtitle: str
    tables: list[Table] = field(default_factory=list)
    omitted: str = ""

    @property
    def narrow(self) -> bool:
        """Whether two of its tables fit beside each other."""
        return all(len(table.columns) <= _NARROW for table in self.tables)


def compare_splits(contents: Contents) -> list[SplitComparison]:
    """Compare the methods on each split by accuracy and by NLL per response token."""
    return [_compare_split(contents, split) for split in SPLITS]


def compare_recovery(contents: Contents) -> Table | None:
    """Compare the methods' recovery over the clusters; None if it was not measured."""
    rows = contents.recovery.rename(columns={"cluster": "key", "recovery": "value"})
    if rows.empty:
        return None
    clusters = sorted(set(rows["key"]) - {"mean", "worst"}, key=_natural)
    counts = {key: number(n) for key, n in rows.groupby("key")["n"].max().dropna().items()}
    columns = {"mean": Column("mean", counts.get("mean", "")), "worst": Column("worst")}
    columns |= {key: Column(f"cluster {key}", counts.get(key, "")) for key in clusters}
    ties = _ties(contents, "recovery", "test", "cluster")
    return _table(contents, "Recovery (%)", rows, columns, percent, best=max, ties=ties)


def _compare_split(contents: Contents, split: str) -> SplitComparison:
    title, subtitle = SPLITS[split]
    rows = contents.summary[contents.summary["split"] == split]
    if rows.empty:
        reason = f"Left out: no {split} rows were evaluated."
        return SplitComparison(title, subtitle, omitted=reason)
    kind = "task" if (rows["group_kind"] == "task").any() else "cluster"
    rows = rows[rows["group_kind"].isin([kind, "all"])]
    rows = rows.assign(key=rows["group_kind"].where(rows["group_kind"] == "all", rows["group"]))
    tables = [
        _metric_table(contents, rows, kind, metric, _ties(contents, metric, split, kind))
        for metric in _METRICS
    ]
    return SplitComparison(title, subtitle, [table for table in tables if table is not None])


def _ties(contents: Contents, metric: str, split: str, kind: str) -> set[tuple[str, str]]:
    """Return the merges, with the key of a column, that are not told apart from the best there."""
    rows = contents.winners
    rows = rows[(rows["metric"] == metric) & (rows["split"] == split) & rows["tie"].astype(bool)]
    return {
        (row["method"], row["group"])
        for row in rows.to_dict("records")
        if row["group_kind"] in ("all", kind)
    }


def _metric_table(
    contents: Contents, rows: pd.DataFrame, kind: str, metric: str, ties: set[tuple[str, str]]
) -> Table | None:
    rows = rows.dropna(subset=[metric])
    if rows.empty:
        return None
    names = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    measured = rows.assign(**{name: rows[column] for name, column in names.items()})
    columns = _columns(measured, kind)
    if metric in _SHARES:
        title = _SHARES[metric]
        return _table(
            contents, title, measured, columns, lambda v: percent(v, 1), best=max, ties=ties
        )
    title = "Negative log-likelihood (nats per response token)"
    return _table(contents, title, measured, columns, lambda v: number(v, 3), best=min, ties=ties)


def _columns(rows: pd.DataFrame, kind: str) -> dict[str, Column]:
    """Return "all" and then the groups; one group alone is not repeated as "all"."""
    counts = rows.groupby("key")["n"].max()
    groups = sorted(set(counts.index) - {"all"}, key=_natural)
    shown = groups if len(groups) == 1 else ["all", *groups]
    prefix = "cluster " if kind == "cluster" else ""
    return {
        key: Column("all" if key == "all" else f"{prefix}{key}", number(counts[key]))
        for key in shown
        if key in counts
    }


def _table(
    contents: Contents,
    title: str,
    rows: pd.DataFrame,
    columns: Mapping[str, Column],
    write: Callable[[float], str],
    *,
    best: Callable[[list[float]], float],
    ties: set[tuple[str, str]],
) -> Table:
    """Lay out long rows (method, key, value, low, high) as a table of `columns`."""
    cells = {
        (row["method"], row["key"]): Cell(write(row["value"]), _beside(row, write), row["value"])
        for row in rows.dropna(subset=["value"]).to_dict("records")
        if row["key"] in columns
    }
    present = {method for method, _ in cells}
    merged = [method for method in merges(contents) if method in present]
    _mark_best(cells, merged, list(columns), best)
    for place in ties & set(cells):
        cells[place] = replace(cells[place], tied=not cells[place].best)
    return Table(
        title,
        list(columns.values()),
        [_row(method, columns, cells) for method in references(present)],
        [_row(method, columns, cells) for method in merged],
    )


def _beside(row: Mapping[Hashable, Any], write: Callable[[float], str]) -> str:
    """Write what stands beside a value: its interval, or for a worst cluster its rows."""
    if row["key"] == "worst":
        return "" if pd.isna(row["n"]) else f"n = {number(row['n'])}"
    return interval(write(row["low"]), write(row["high"]))


def _mark_best(
    cells: dict[tuple[str, str], Cell],
    merged: list[str],
    keys: list[str],
    best: Callable[[list[float]], float],
) -> None:
    """Mark, in place, the best merge of each column that has several, unless all are alike."""
    for key in keys:
        if key == "worst":  # of other rows in every method: there is nothing to compare
            continue
        rivals = {
            m: value for m in merged if (value := cells.get((m, key), Cell()).value) is not None
        }
        for method in rivals if len(rivals) > 1 else {}:
            figures = list(rivals.values())
            won = len(set(figures)) > 1 and rivals[method] == best(figures)
            cells[method, key] = replace(cells[method, key], best=won)


def _row(method: str, columns: Mapping[str, Column], cells: Mapping[tuple[str, str], Cell]) -> Row:
    return Row(method, label(method), [cells.get((method, key), Cell()) for key in columns])


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value, before other names."""
    return (False, int(name), "") if name.isdigit() else (True, 0, name)
