"""Printing and saving the tables of the benchmarks."""

import platform
from pathlib import Path

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def report(name: str, title: str, frame: pd.DataFrame, note: str = "") -> None:
    """Print a table and save it as ``benchmarks/results/<name>.md``.

    Parameters
    ----------
    name : str
        File name without suffix.
    title : str
        Heading.
    frame : DataFrame
        One row per line of the table.
    note : str
        What a reader must know beside the machine and the versions, which are added.
    """
    threads = torch.get_num_threads()
    machine = (
        f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    )
    text = f"# {title}\n\n{markdown(frame)}\n\n{note}\n\nMachine: {machine}.\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
