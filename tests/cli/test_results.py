"""The table a run prints at its end is readable on a terminal of any usual width."""

import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from tclora.library.layout import Layout
from tclora_cli.results import method_table

_METHODS = ("base", "own", "joint", "tc-lora-mean", "compress-merge", "routed")
_SPLITS = ("test", "ood", "composition")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Evaluation tables of six methods on three kinds of tasks."""
    tables = Layout(tmp_path).evaluation
    tables.summary.parent.mkdir(parents=True)
    bounds = {"nll_low": 0.504, "nll_high": 0.961, "accuracy_low": 0.2, "accuracy_high": 0.45}
    pd.DataFrame(
        {"method": method, "split": split, "group_kind": "all", "n": 60, "seeds": 1}
        | {"nll": 1.704, "accuracy": 0.32}
        | bounds
        for method in _METHODS
        for split in _SPLITS
    ).to_parquet(tables.summary)
    shares = {"low": 0.96, "high": 1.25, "n": 10}
    pd.DataFrame(
        {"method": method, "cluster": cluster, "recovery": recovery} | shares
        for method in _METHODS[2:]
        for cluster, recovery in (("mean", 1.03), ("worst", 0.84))
    ).to_parquet(tables.recovery)
    return tmp_path


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_name_and_no_number_is_cut(library: Path, width: int) -> None:
    text = _printed(library, width)
    assert "…" not in text
    words = re.split(r"\s+", text)
    assert [word for word in words if word in _METHODS] == list(_METHODS)
    assert words.count("1.704") == words.count("[0.50,0.96]") == len(_METHODS) * len(_SPLITS)
    assert words.count("0.32") == words.count("[0.20,0.45]") == len(_METHODS) * len(_SPLITS)
    for word in ("103%", "[96,125]", "84%", "n=10"):
        assert words.count(word) == len(_METHODS) - 2


def test_a_wide_terminal_has_a_line_for_a_number_and_its_interval(library: Path) -> None:
    assert "1.704 [0.50,0.96]" in _printed(library, width=120)


def _printed(library: Path, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(method_table(library))
    return capture.get()
