"""The canonical frame of examples: the ecosystem's row forms mapped onto fixed columns, checked.

Columns: id, prompt, response, answer and scorer (str); task, metadata (JSON) and skills (tasks
joined by "+"), str or null; choices (list of str or null); split ("train", "test", "ood",
"composition" or null). Rows come in blocks and are kept as Arrow, so that memory holds the texts
once and one block of objects.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from tclora.data.forms import Form, Pair, Row, detect_form, plain_form
from tclora.data.options import Options, options_of, resolve_answer
from tclora.data.readers import BROKEN, broken_lines
from tclora.data.reservoir import Reservoir
from tclora.errors import DataError
from tclora.evaluate.scorers import CHOICES, Expected, check_scorer, default_scorer

SPLITS = ("train", "test", "ood", "composition")
OPTIONAL = ("task", "answer", "choices", "split", "scorer", "metadata", "skills")
COLUMNS = ("id", "prompt", "response", *OPTIONAL)
SCHEMA = pa.schema(
    {name: pa.list_(pa.string()) if name == "choices" else pa.string() for name in COLUMNS[1:]}
)
_REPORTED = 10  # bad rows named in an error


def canonical_frame(
    raw: pd.DataFrame,
    source: str,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> tuple[pd.DataFrame, list[str]]:
    """Map a raw table onto the canonical columns; see `canonical_rows`."""
    return canonical_rows([raw], source, columns, on_bad_row)


def canonical_rows(
    blocks: Iterable[pd.DataFrame],
    source: str,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[str]]:
    """Map the blocks of a raw table onto the canonical columns and check every row.

    Parameters
    ----------
    blocks : iterable of DataFrame
        Rows in prompt/response, Alpaca (instruction, input, output) or chat (messages) form; the
        index holds each row's number in the source.
    source : str
        File or dataset name, for messages.
    columns : mapping, optional
        Canonical column → column of the source, where names differ.
    on_bad_row : {"error", "skip"}
        Whether a line that holds no row, or a row without prompt or response, is an error, or left
        out and listed.
    limit : int, optional
        Keep a uniform sample of this many good rows; memory holds no more than twice as many.
    seed : int
        Seed of that sample.

    Returns
    -------
    frame : DataFrame
        The canonical columns; ``split`` is null where the source does not say.
    skipped : list of str
        One line per row left out.

    Raises
    ------
    DataError
        If there are no rows, no known form, an unknown column in `columns`, a bad row (with
        "error"), no usable row, or an unknown split.
    """
    reader = _Reader(source, columns or {}, Reservoir(limit, seed))
    for block in blocks:
        if not block.empty:
            reader.add(block)
    return reader.finish(on_bad_row)


class _Reader:
    """Takes the blocks of one source."""

    def __init__(self, source: str, columns: Mapping[str, str], kept: Reservoir) -> None:
        known = {"prompt", "response", "messages", *OPTIONAL}
        if unknown := [name for name in columns if name not in known]:
            raise DataError(f"data.columns: {unknown[0]!r} must be one of {sorted(known)}")
        self._source = source
        self._columns = columns
        self._kept = kept
        self._form: Form | None = None
        self._present: dict[str, None] = {}  # columns of the source, in order
        self._problems: list[str] = []
        self._empty = True

    def add(self, raw: pd.DataFrame) -> None:
        """Check the rows of a block and keep the good ones."""
        self._empty = False
        if broken := broken_lines(raw):
            self._problems += [f"{self._source}, line {n}: {what}" for n, what in broken.items()]
            raw = raw.drop(index=list(broken), columns=BROKEN)
            if raw.empty:
                return
        self._present |= dict.fromkeys(map(str, raw.columns))
        raw = self._rename(raw)
        form = self._form = self._form or self._detect(raw)
        pairs = {}
        for number, row in zip(raw.index, raw.to_dict("records"), strict=True):
            try:
                pairs[number] = form(row)
                _check_answer(row, pairs[number])
            except ValueError as problem:
                pairs.pop(number, None)
                self._problems.append(f"{self._source}, row {number}: {problem}")
        if pairs:
            self._kept.add(_assemble(raw.loc[list(pairs)], list(pairs.values()), self._source))

    def finish(self, on_bad_row: str) -> tuple[pd.DataFrame, list[str]]:
        """Return all rows kept and a line per row left out; see `canonical_rows`."""
        if self._empty:
            raise DataError(f"{self._source}: must hold at least one row, got none; give rows")
        self._check_columns()
        if self._problems and (on_bad_row == "error" or not self._kept.seen):
            raise DataError(_list_problems(self._problems))
        frame = self._kept.table().to_pandas()
        pa.default_memory_pool().release_unused()  # Arrow keeps what blocks have freed
        if frame["choices"].notna().any():
            frame["choices"] = [own if own is None else own.tolist() for own in frame["choices"]]
        return frame.assign(id=content_ids(frame))[list(COLUMNS)], self._problems

    def _detect(self, raw: pd.DataFrame) -> Form:
        if {"prompt", "response"} <= set(self._columns):
            return plain_form("prompt", "response")
        try:
            return detect_form(raw.columns, self._source)
        except DataError:
            self._check_columns()  # says better what is wrong
            raise

    def _check_columns(self) -> None:
        for canonical, column in self._columns.items():
            if column not in self._present:
                raise DataError(
                    f"data.columns: {canonical} must name a column of {self._source}, got "
                    f"{column!r}; it has {list(self._present)}"
                )

    def _rename(self, raw: pd.DataFrame) -> pd.DataFrame:
        given = self._columns
        if "task" not in raw and "task" not in given:  # as collections of tasks call it
            raw = raw.rename(columns={"task_name": "task"})
        replaced = raw.drop(columns=[c for c in given if c in raw and c not in given.values()])
        return replaced.rename(columns={column: name for name, column in given.items()})


def _list_problems(problems: list[str]) -> str:
    shown = "\n".join(f"  - {line}" for line in problems[:_REPORTED])
    more = f"\n  - and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
    return (
        f"{len(problems)} bad row(s):\n{shown}{more}\n"
        "repair them, or set data.on_bad_row: skip to leave them out"
    )


def _check_answer(row: Row, pair: Pair) -> None:
    """Raise ValueError if a row's answer cannot be scored by the scorer it names."""
    scorer, choices = _optional(row.get("scorer")), options_of(row.get("choices"))
    if scorer is None and choices is None:
        return
    given = _optional(row.get("answer"))
    answer = str(pair[1] if given is None else given)
    if choices and scorer in (None, CHOICES):
        answer = resolve_answer(answer, choices)
    if scorer:
        options = tuple(choices.texts) if choices else ()
        metadata = _optional(row.get("metadata"))
        check_scorer(str(scorer), Expected(answer, *pair, options, metadata))


def _assemble(kept: pd.DataFrame, pairs: list[Pair], source: str) -> pa.Table:
    """Return the canonical columns of one block, but for the id."""
    frame = pd.DataFrame(pairs, columns=["prompt", "response"], dtype=object)
    for column in OPTIONAL:
        values = [_optional(v) for v in kept[column]] if column in kept else [None] * len(kept)
        # Labels may be numbers in the source.
        plain = _skills if column == "skills" else str
        values = [value if value is None else plain(value) for value in values]
        frame[column] = pd.Series(values, dtype=object)
    several = frame["skills"].str.contains("+", regex=False, na=False)
    frame["split"] = frame["split"].mask(several & frame["split"].isna(), "composition")
    unknown = set(frame["split"].dropna()) - set(SPLITS)
    if unknown:
        raise DataError(f"{source}: split must be one of {SPLITS}, got {sorted(unknown)}")
    frame["answer"] = frame["answer"].where(frame["answer"].notna(), frame["response"]).map(str)
    if "choices" in kept:
        frame = _with_options(frame, [options_of(value) for value in kept["choices"]])
    known = zip(frame["answer"], frame["response"], frame["choices"], strict=True)
    scorers = pd.Series([default_scorer(*row) for row in known], index=frame.index, dtype=object)
    frame["scorer"] = frame["scorer"].where(frame["scorer"].notna(), scorers)
    return pa.Table.from_pandas(frame, SCHEMA, preserve_index=False).replace_schema_metadata()


def _with_options(frame: pd.DataFrame, options: list[Options | None]) -> pd.DataFrame:
    """Return the rows with their options as texts, and the answers that mean one of them."""
    answers = [
        resolve_answer(answer, own) if own and scorer in (None, CHOICES) else answer
        for answer, scorer, own in zip(frame["answer"], frame["scorer"], options, strict=True)
    ]
    texts = pd.Series([own and own.texts for own in options], index=frame.index, dtype=object)
    return frame.assign(answer=pd.Series(answers, dtype=object), choices=texts)


def _skills(value: Any) -> str:  # noqa: ANN401
    """Join the tasks whose skills a row needs: a list, or names set off by "+" or a comma."""
    names = value if isinstance(value, list) else str(value).replace("+", ",").split(",")
    return "+".join(sorted(str(name).strip() for name in names))


def _optional(value: Any) -> Any:  # noqa: ANN401
    """Return None for every kind of missing; lists stay lists, dicts become JSON."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return json.dumps(value)
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return None
    return value


def content_ids(frame: pd.DataFrame) -> "pd.Series[str]":
    """Return stable content hashes; a repeated row gets its repetition number appended."""
    digests = [
        hashlib.sha256(f"{prompt}\0{response}".encode()).hexdigest()[:16]
        for prompt, response in zip(frame["prompt"], frame["response"], strict=True)
    ]
    ids = pd.Series(digests, index=frame.index, dtype="str")
    again = ids.groupby(ids, sort=False).cumcount()
    repeated = again > 0
    ids[repeated] = ids[repeated] + "-" + (again[repeated] + 1).astype("str")
    return ids
