"""What a study leaves: table, plot and a summary in Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from tclora.files import atomic_path, write_text
from tclora.report.notation import MISSING
from tclora.study.registry import Outcome


@dataclass(frozen=True)
class StudyLayout:
    """The files of a study.

    Attributes
    ----------
    folder : Path
        Its folder, which holds the library of every cell too.
    """

    folder: Path

    @property
    def records(self) -> Path:
        """Folder of records of what cells have in common."""
        return self.folder / ".shared"

    @property
    def parquet(self) -> Path:
        """The table."""
        return self.folder / "study.parquet"

    @property
    def csv(self) -> Path:
        """The table again."""
        return self.folder / "study.csv"

    @property
    def plot(self) -> Path:
        """The plot; SVG."""
        return self.folder / "study.svg"

    @property
    def summary(self) -> Path:
        """All of it to read; Markdown."""
        return self.folder / "study.md"


def write_study(layout: StudyLayout, title: str, outcome: Outcome) -> None:
    """Write table, plot and summary."""
    with atomic_path(layout.parquet) as fresh:
        _with_one_type_each(outcome.table).to_parquet(fresh)
    with atomic_path(layout.csv) as fresh:
        outcome.table.to_csv(fresh, index=False)
    with atomic_path(layout.plot) as fresh, mpl.rc_context({"svg.hashsalt": title}):
        outcome.figure.savefig(fresh, format="svg", metadata={"Date": None})
    notes = "\n".join(f"- {note}" for note in outcome.notes)
    text = f"# {title}\n\n{markdown_table(outcome.table)}\n\n{notes}\n\n![]({layout.plot.name})\n"
    write_text(layout.summary, text)


def _with_one_type_each(frame: pd.DataFrame) -> pd.DataFrame:
    """Return columns of values of several types, as of an axis [auto, 4], as text."""
    mixed = [str(column) for column in frame if frame[column].dropna().map(type).nunique() > 1]
    texts = {c: frame[c].map(lambda value: None if pd.isna(value) else str(value)) for c in mixed}
    return frame.assign(**texts)


def markdown_table(frame: pd.DataFrame) -> str:
    """Write a table in Markdown; estimates come with the ends of their intervals in brackets."""
    columns = [c for c in frame if not str(c).endswith(("_low", "_high"))]
    lines = [list(map(str, columns)), ["---"] * len(columns)]
    lines += [[_cell(row, str(column)) for column in columns] for row in frame.to_dict("records")]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping[Any, Any], column: str) -> str:
    value = row[column]
    if pd.isna(value):
        return MISSING
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if f"{column}_low" not in row:
        return text
    return f"{text} [{row[f'{column}_low']:.3f}, {row[f'{column}_high']:.3f}]"
