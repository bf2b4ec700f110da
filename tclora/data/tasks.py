"""Tasks to evaluate on: files of rows, with what is shown before each prompt."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from tclora.data.frame import canonical_frame
from tclora.data.readers import SUFFIXES, read_table
from tclora.errors import ConfigError, DataError
from tclora.evaluate.scorers import Expected, check_scorer
from tclora.registry import closest


@dataclass(frozen=True)
class TaskSettings:
    """How task files are read.

    Attributes
    ----------
    limits : mapping
        Task → measure so many of its first rows only; under "" for tasks that are not named.
    few_shot : int
        Training rows of a task that are shown before each of its prompts.
    shown_from : sequence of str
        Files of rows to show; in the task files those of split "train" are.
    scorers : mapping
        Task → scorer of all its rows, whatever they name.
    seed : int
        Seed of the draw of rows to show.
    others : sequence of str
        Tasks that are no files, which limits may name too.
    """

    limits: Mapping[str, int] = field(default_factory=dict)
    few_shot: int = 0
    shown_from: Sequence[str] = ()
    scorers: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    others: Sequence[str] = ()


def is_task_file(spec: str) -> bool:
    """Whether a task is a file or folder of rows, rather than one of lm-eval's."""
    return Path(spec).is_dir() or Path(spec).suffix in SUFFIXES


def read_tasks(files: Sequence[str], settings: TaskSettings) -> dict[str, pd.DataFrame]:
    """Read and check the rows of task files.

    Parameters
    ----------
    files : sequence of str
        JSONL, Parquet or CSV files, or folders of them; see `tclora.data.readers.read_table`.
    settings : TaskSettings

    Returns
    -------
    dict of str to DataFrame
        File's name without its end → canonical rows to measure, those of split "train" left out;
        a row without a task is of the task of its file's name. A column shots, where rows are
        shown.

    Raises
    ------
    DataError
        If a file cannot be read or leaves nothing to measure, or two have one name.
    ConfigError
        If a scorer is named for an unknown task or cannot score it, or a task has too few rows to
        show.
    """
    read = {}
    for path in _files(files):
        if path.stem in read:
            raise DataError(f"tasks must have names of their own, got two files {path.stem!r}")
        read[path.stem] = _read(path)
    shown = [_read(path) for path in _files(settings.shown_from)]
    shown += [rows[rows["split"] == "train"] for rows in read.values()]
    measured = {}
    for name, rows in read.items():
        chosen = rows[rows["split"] != "train"]
        if chosen.empty:
            raise DataError(f"task {name!r} must have rows to measure, got those of split train")
        measured[name] = _limited(chosen, settings.limits).reset_index(drop=True)
    labels = {task for rows in measured.values() for task in rows["task"]}
    limited = [name for name in settings.limits if name]
    _check_names("--limit must name a task", limited, labels | set(settings.others))
    _check_names("--scorer must name a task of rows", settings.scorers, labels)
    scored = {name: _scored(rows, settings.scorers) for name, rows in measured.items()}
    if not settings.few_shot:
        return scored
    pool = pd.concat(shown) if shown else pd.DataFrame(columns=["task", "prompt", "response"])
    return {name: _with_shots(rows, pool, settings) for name, rows in scored.items()}


def _files(specs: Sequence[str]) -> list[Path]:
    """Return the files that specs name, those of folders in alphabetical order."""
    found: list[Path] = []
    for spec in map(Path, specs):
        inside = sorted(file for file in spec.glob("*") if file.suffix in SUFFIXES)
        if spec.is_dir() and not inside:
            raise DataError(f"task folder {str(spec)!r} holds no file ending in {SUFFIXES}")
        found += inside if spec.is_dir() else [spec]
    return found


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"task file {str(path)!r} does not exist; correct the path")
    rows, _ = canonical_frame(read_table(str(path)), str(path))
    return rows.assign(task=rows["task"].fillna(path.stem))


def _limited(rows: pd.DataFrame, limits: Mapping[str, int]) -> pd.DataFrame:
    """Return the first rows of each task."""
    allowed = rows["task"].map(limits).fillna(limits.get("", len(rows)))
    return rows[rows.groupby("task").cumcount() < allowed]


def _check_names(demand: str, names: Iterable[str], tasks: Collection[str]) -> None:
    for name in names:
        if name not in tasks:
            raise ConfigError(f"{demand}, got {name!r}; {closest(name, tasks)}")


def _scored(rows: pd.DataFrame, scorers: Mapping[str, str]) -> pd.DataFrame:
    """Return rows with the scorers that their tasks are given."""
    given = rows["task"].map(scorers)
    for row in rows[given.notna()].to_dict("records"):
        try:
            check_scorer(
                scorers[row["task"]],
                Expected(
                    row["answer"],
                    row["prompt"],
                    row["response"],
                    tuple(row["choices"] or ()),
                    row["metadata"],
                ),
            )
        except ValueError as error:
            raise ConfigError(f"--scorer of task {row['task']}: {error}") from error
    return rows.assign(scorer=given.where(given.notna(), rows["scorer"]))


def _with_shots(rows: pd.DataFrame, pool: pd.DataFrame, settings: TaskSettings) -> pd.DataFrame:
    """Return rows with the same rows of their task shown before each, none of them measured."""
    shots: dict[str, list[list[str]]] = {}
    for task, own in rows.groupby("task"):
        known = pool[(pool["task"] == task) & ~pool["prompt"].isin(own["prompt"])]
        if len(known) < settings.few_shot:
            raise ConfigError(
                f"--few-shot must be at most the training rows of task {task!r} ({len(known)}), "
                f"got {settings.few_shot}; give rows of split train, or a file by --shots"
            )
        drawn = known.sample(settings.few_shot, random_state=settings.seed)
        shots[str(task)] = drawn[["prompt", "response"]].to_numpy().tolist()
    return rows.assign(shots=rows["task"].map(shots))
