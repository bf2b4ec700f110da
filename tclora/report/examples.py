"""A few generated answers per task, each method's beside what was expected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tclora.library.contents import Contents
from tclora.report.comparison import SPLITS
from tclora.report.methods import label, merges, references
from tclora.report.notation import is_missing, shorten

MAX_TASKS = 12  # of a split

_PROMPT_LENGTH = 700
_ANSWER_LENGTH = 240
_TITLE_LENGTH = 110


@dataclass(frozen=True)
class Generation:
    """What one method wrote; `correct` is None where it is not defined."""

    method: str
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Example:
    """One item and every method's answer to it."""

    title: str
    prompt: str
    answer: str
    generations: list[Generation]


@dataclass(frozen=True)
class ExampleGroup:
    """The examples of one task, or of one cluster where there are no tasks."""

    title: str
    split: str
    examples: list[Example]


def choose_examples(contents: Contents) -> list[ExampleGroup]:
    """Choose, per task, the first item the judge gets right and the first it gets wrong.

    Items are in the order of their ids, so the choice does not depend on how the answers look;
    where correctness is not defined the first two items are taken. Tasks of a split beyond
    `MAX_TASKS` are left out.
    """
    items = contents.items.dropna(subset=["generated"])
    items = items[items["seed"].isna() | (items["seed"] == items["seed"].min())]
    items = items.assign(group=items["task"].fillna("cluster " + items["cluster"].astype(str)))
    order = [*references(items["method"]), *merges(contents)]
    groups = []
    for split, (title, _) in SPLITS.items():
        part = items[items["split"] == split]
        for name in sorted(part["group"].unique())[:MAX_TASKS]:
            rows = part[part["group"] == name]
            chosen = [rows[rows["id"] == item] for item in _choose(rows, judge(contents))]
            groups.append(ExampleGroup(name, title, [_example(item, order) for item in chosen]))
    return groups


def judge(contents: Contents) -> str:
    """Return the method whose right and wrong answers choose the examples: the best merge."""
    return next(iter(merges(contents)), contents.primary)


def _choose(rows: pd.DataFrame, method: str) -> list[str]:
    judged = rows[rows["method"] == method].sort_values("id")
    judged = rows.sort_values("id") if judged.empty else judged
    scored = judged.dropna(subset=["correct"]).drop_duplicates("correct")
    chosen = judged if scored.empty else scored
    return chosen["id"].drop_duplicates().head(2).tolist()


def _example(rows: pd.DataFrame, order: list[str]) -> Example:
    by_method = {row["method"]: row for row in rows.to_dict("records")}
    first = next(iter(by_method.values()))
    return Example(
        shorten(first["prompt"], _TITLE_LENGTH),
        _cut(first["prompt"], _PROMPT_LENGTH),
        "" if pd.isna(first["answer"]) else _cut(first["answer"], _ANSWER_LENGTH),
        [_generation(by_method[method]) for method in order if method in by_method],
    )


def _generation(row: Mapping[Any, Any]) -> Generation:
    correct = None if is_missing(row["correct"]) else bool(row["correct"])
    return Generation(label(row["method"]), _cut(row["generated"], _ANSWER_LENGTH), correct)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
