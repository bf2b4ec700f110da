"""The forms of rows the ecosystem uses: prompt and response of one row in each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from tclora.errors import DataError

_PLAIN_FORMS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("inputs", "targets"),
    ("input", "target"),
    ("source", "target"),
    ("question", "answer"),
)
_OTHER_NAMES = ", ".join("/".join(pair) for pair in _PLAIN_FORMS[1:])

Row = Mapping[Any, Any]
Pair = tuple[str, str]
Form = Callable[[Row], Pair]


def detect_form(columns: Iterable[str], source: str) -> Form:
    """Return what gives prompt and response of the rows of a table with these columns.

    Raises
    ------
    DataError
        If the columns are those of no known form.
    """
    given = list(columns)
    if {"instruction", "output"} <= set(given):
        return _alpaca_pair
    if "messages" in given:
        return _chat_pair
    for prompt, response in _PLAIN_FORMS:
        if {prompt, response} <= set(given):
            return plain_form(prompt, response)
    raise DataError(
        f"{source}: columns must be prompt/response (or {_OTHER_NAMES}), instruction/output "
        f"(Alpaca) or messages (chat), got {given}; name yours in data.columns"
    )


def plain_form(prompt: str, response: str) -> Form:
    """Return what takes prompt and response from two columns."""
    return lambda row: (_text(row.get(prompt), prompt), _text(row.get(response), response))


def _alpaca_pair(row: Row) -> Pair:
    prompt = _text(row.get("instruction"), "instruction")
    extra = row.get("input")
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra.strip()}"
    return prompt, _text(row.get("output"), "output")


def _chat_pair(row: Row) -> Pair:
    """Take the last assistant turn as the response, the turns before it as the prompt."""
    turns: Any = row.get("messages")
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
