"""The options of a multiple-choice row, in the forms that data sets have them in."""

import json
import string
from collections.abc import Sequence
from typing import Any, NamedTuple


class Options(NamedTuple):
    """The options of one row.

    Attributes
    ----------
    texts : list of str
        What can be answered.
    labels : list of str
        What each is called, A, B, … where the data do not say.
    """

    texts: list[str]
    labels: Sequence[str]


def options_of(value: Any) -> Options | None:  # noqa: ANN401
    """Read the options of a row.

    Parameters
    ----------
    value : list of str, mapping or str
        The texts; or ``{"text": […], "label": […]}``, as ARC and CommonsenseQA have it; or either
        as JSON, as in CSV files. Missing values of any kind give None.

    Raises
    ------
    ValueError
        If it is none of these, or has fewer than two options.
    """
    if isinstance(value, str):
        value = _parse(value)
    if isinstance(value, dict):
        texts, labels = _list(value.get("text")), _list(value.get("label"))
    else:
        texts, labels = _list(value), None
        if texts is None and (value is None or value != value):  # NaN
            return None
    if texts is None or not all(isinstance(t, (str, int, float)) and str(t).strip() for t in texts):
        raise ValueError(f"choices must be a list of texts, none empty, got {value!r:.60}")
    if len(texts) < 2 or (labels is not None and len(labels) != len(texts)):
        raise ValueError(f"choices must be at least two, each with its label, got {value!r:.60}")
    return Options(
        [str(t).strip() for t in texts], [str(x) for x in labels or string.ascii_uppercase]
    )


def resolve_answer(answer: str, options: Options) -> str:
    """Return the option that an answer means: by its text, else by its label.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if answer in options.texts:
        return answer
    known = dict(zip(options.labels, options.texts, strict=False))
    if answer.strip() in known:
        return known[answer.strip()]
    raise ValueError(f"answer must be one of the choices {options.texts}, got {answer!r}")


def _list(value: Any) -> list[Any] | None:  # noqa: ANN401
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else None


def _parse(text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"choices must be a list of texts as JSON, got {text!r:.60}") from error
