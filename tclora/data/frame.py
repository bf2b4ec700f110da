"""The canonical frame of examples: the ecosystem's row forms mapped onto fixed columns, checked.

Columns: id, prompt, response, answer and scorer (str); task, metadata (JSON) and skills (tasks
joined by "+"), str or null; choices (list of str or null); split ("train", "test", "ood",
"composition" or null).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from tclora.data.options import Options, options_of, resolve_answer
from tclora.errors import DataError
from tclora.evaluate.scorers import CHOICES, Expected, check_scorer, default_scorer

SPLITS = ("train", "test", "ood", "composition")
OPTIONAL = ("task", "answer", "choices", "split", "scorer", "metadata", "skills")
COLUMNS = ("id", "prompt", "response", *OPTIONAL)
_PLAIN_FORMS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("inputs", "targets"),
    ("input", "target"),
    ("question", "answer"),
)
_OTHER_NAMES = ", ".join("/".join(pair) for pair in _PLAIN_FORMS[1:])
_REPORTED = 10  # bad rows named in an error

Row = Mapping[Any, Any]
Pair = tuple[str, str]


def canonical_frame(
    raw: pd.DataFrame,
    source: str,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> tuple[pd.DataFrame, list[str]]:
    """Map a raw table onto the canonical columns and check every row.

    Parameters
    ----------
    raw : DataFrame
        Rows in prompt/response, Alpaca (instruction, input, output) or chat (messages) form; the
        index holds each row's number in the source.
    source : str
        File or dataset name, for messages.
    columns : mapping, optional
        Canonical column → column of `raw`, where names differ.
    on_bad_row : {"error", "skip"}
        Whether a row without prompt or response is an error, or left out and listed.

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
    if raw.empty:
        raise DataError(f"{source}: must hold at least one row, got none; give rows")
    raw = _rename(raw, source, columns or {})
    mapped = {"prompt", "response"} <= set(columns or {})
    pair_of = _plain_form("prompt", "response") if mapped else _detect_form(raw, source)
    pairs, problems = {}, {}
    for number, row in zip(raw.index, raw.to_dict("records"), strict=True):
        try:
            pairs[number] = pair_of(row)
            _check_answer(row, pairs[number])
        except ValueError as problem:
            problems[number] = f"{source}, row {number}: {problem}"
    if problems and (on_bad_row == "error" or not pairs):
        raise DataError(_list_problems(list(problems.values())))
    kept = raw.loc[list(pairs)]
    return _assemble(kept, list(pairs.values()), source), list(problems.values())


def _check_answer(row: Row, pair: Pair) -> None:
    """Raise ValueError if a row's answer cannot be scored by the scorer it names."""
    scorer, choices = _optional(row.get("scorer")), options_of(row.get("choices"))
    if scorer is None and choices is None:
        return
    answer = str(_optional(row.get("answer")) or pair[1])
    if choices and scorer in (None, CHOICES):
        answer = resolve_answer(answer, choices)
    if scorer:
        options = tuple(choices.texts) if choices else ()
        metadata = _optional(row.get("metadata"))
        check_scorer(str(scorer), Expected(answer, *pair, options, metadata))


def _list_problems(problems: list[str]) -> str:
    shown = "\n".join(f"  - {line}" for line in problems[:_REPORTED])
    more = f"\n  - and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
    return (
        f"{len(problems)} bad row(s):\n{shown}{more}\n"
        "repair them, or set data.on_bad_row: skip to leave them out"
    )


def _rename(raw: pd.DataFrame, source: str, columns: Mapping[str, str]) -> pd.DataFrame:
    known = {"prompt", "response", "messages", *OPTIONAL}
    for canonical, column in columns.items():
        if canonical not in known:
            raise DataError(f"data.columns: {canonical!r} must be one of {sorted(known)}")
        if column not in raw.columns:
            raise DataError(
                f"data.columns: {canonical} must name a column of {source}, got {column!r}; "
                f"it has {list(raw.columns)}"
            )
    replaced = raw.drop(columns=[c for c in columns if c in raw and c not in columns.values()])
    return replaced.rename(columns={column: name for name, column in columns.items()})


def _detect_form(raw: pd.DataFrame, source: str) -> Callable[[Row], Pair]:
    columns = set(raw.columns)
    if {"instruction", "output"} <= columns:
        return _alpaca_pair
    if "messages" in columns:
        return _chat_pair
    for prompt, response in _PLAIN_FORMS:
        if {prompt, response} <= columns:
            return _plain_form(prompt, response)
    raise DataError(
        f"{source}: columns must be prompt/response (or {_OTHER_NAMES}), instruction/output "
        f"(Alpaca) or messages (chat), got {list(raw.columns)}; name yours in data.columns"
    )


def _plain_form(prompt: str, response: str) -> Callable[[Row], Pair]:
    return lambda row: (_text(row[prompt], prompt), _text(row[response], response))


def _alpaca_pair(row: Row) -> Pair:
    prompt = _text(row["instruction"], "instruction")
    extra = row.get("input")
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra.strip()}"
    return prompt, _text(row["output"], "output")


def _chat_pair(row: Row) -> Pair:
    """Take the last assistant turn as the response, the turns before it as the prompt."""
    turns = row["messages"]
    turns = turns.tolist() if hasattr(turns, "tolist") else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"messages must be a list of turns, got {turns!r:.60}")
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        raise ValueError("every turn of messages must have role and content")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"the last turn must be the assistant's, got {turns[-1]['role']!r}")
    response = _text(turns[-1]["content"], "the last turn's content")
    earlier = [(turn["role"], _text(turn["content"], "content")) for turn in turns[:-1]]
    if len(earlier) == 1:
        return earlier[0][1], response
    return _text("\n\n".join(f"{role}: {text}" for role, text in earlier), "prompt"), response


def _text(value: Any, field: str) -> str:  # noqa: ANN401
    if value is None or (isinstance(value, float) and pd.isna(value)):
        raise ValueError(f"{field} must be text, got nothing")
    if not isinstance(value, str):
        if isinstance(value, (bool, int, float)):
            return str(value)
        raise ValueError(f"{field} must be text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{field} must not be empty, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise ValueError(f"{field} must be Unicode text, got {value[error.start]!r}") from None
    return value.strip()


def _assemble(kept: pd.DataFrame, pairs: list[Pair], source: str) -> pd.DataFrame:
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
    return frame.assign(id=content_ids(frame))[list(COLUMNS)]


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


def content_ids(frame: pd.DataFrame) -> list[str]:
    """Return stable content hashes; a repeated row gets its repetition number appended."""
    seen: dict[str, int] = {}
    ids = []
    for prompt, response in zip(frame["prompt"], frame["response"], strict=True):
        digest = hashlib.sha256(f"{prompt}\0{response}".encode()).hexdigest()[:16]
        seen[digest] = seen.get(digest, 0) + 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids
