"""A few generated answers per task, each method's beside what was expected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tclora.report.contents import Contents
from tclora.report.methods import label, merges, references
from tclora.report.notation import is_missing, shorten

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

    split: str
    group: str
    title: str
    prompt: str
    answer: str
    generations: list[Generation]


def choose_examples(contents: Contents) -> list[Example]:
    """Choose, per task, the first item the best merge gets right and the first it gets wrong.

    Items are in the order of their ids, so the choice does not depend on how well the answers look;
    where correctness is not defined the first two items are taken.
    """
    items = contents.items.dropna(subset=["generated"])
    if items.empty:
        return []
    order = [*references(items["method"]), *merges(contents)]
    items = items[items["method"].isin(order)]
    items = items.assign(group=items["task"].fillna("cluster " + items["cluster"].astype(str)))
    judge = next(iter(merges(contents)), order[0])
    return [
        _example(rows[rows["id"] == chosen], order)
        for split in ("test", "ood", "composition")
        for _, rows in items[items["split"] == split].groupby("group")
        for chosen in _choose(rows, judge)
    ]


def _choose(rows: pd.DataFrame, judge: str) -> list[str]:
    judged = rows[rows["method"] == judge].sort_values("id")
    judged = rows.sort_values("id") if judged.empty else judged
    contrasting = judged.drop_duplicates("correct") if judged["correct"].notna().any() else judged
    return contrasting["id"].drop_duplicates().head(2).tolist()


def _example(rows: pd.DataFrame, order: list[str]) -> Example:
    by_method = {row["method"]: row for row in rows.to_dict("records")}
    first = next(iter(by_method.values()))
    return Example(
        first["split"],
        first["group"],
        shorten(first["prompt"], _TITLE_LENGTH),
        _cut(first["prompt"], _PROMPT_LENGTH),
        _cut(first["answer"] or "", _ANSWER_LENGTH),
        [_generation(by_method[method]) for method in order if method in by_method],
    )


def _generation(row: Mapping[Any, Any]) -> Generation:
    correct = None if is_missing(row["correct"]) else bool(row["correct"])
    return Generation(label(row["method"]), _cut(row["generated"], _ANSWER_LENGTH), correct)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
