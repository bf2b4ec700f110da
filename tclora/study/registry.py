"""The registry of studies: which overrides, up to which step, and what is made of the runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tclora.config import IntervalConfig
from tclora.registry import Registry
from tclora.study.cells import Axes, Cell


@dataclass(frozen=True)
class Outcome:
    """What a study ends in.

    Attributes
    ----------
    table : DataFrame
        One row per setting and figure.
    figure : Figure
        The plot.
    notes : tuple of str
        What a reader must know to read the table.
    """

    table: pd.DataFrame
    figure: Figure
    notes: tuple[str, ...]


Check = Callable[[Sequence[Cell]], None]
Summarise = Callable[[Sequence[Cell], Mapping[str, Any], IntervalConfig], Outcome]


@dataclass(frozen=True)
class Study:
    """A kind of study.

    Attributes
    ----------
    summary : str
        One line.
    axes : Axes
        Keys and the values each takes, unless told otherwise.
    summarise : callable
        (cells, control, intervals) → outcome.
    until : {"prepare", "evaluate"}
        Last step of every run.
    control : Mapping
        The overrides of the runs that others are compared with, such as random clusters.
    check : callable
        (cells) → None; raises `ConfigError`, before anything runs, if they could tell nothing.
    """

    summary: str
    axes: Axes
    summarise: Summarise
    until: str = "evaluate"
    control: Mapping[str, Any] = field(default_factory=dict)
    check: Check = lambda _: None


studies: Registry[Study] = Registry("study", lambda study: study.summary)
