import numpy as np
import pandas as pd
import pytest

from tclora.data.frame import canonical_frame
from tclora.data.options import options_of, resolve_answer
from tclora.errors import DataError


@pytest.mark.parametrize(
    "value",
    [
        ["red", "blue"],
        np.array(["red", "blue"], dtype=object),
        '["red", "blue"]',
        {"text": ["red", "blue"], "label": ["A", "B"]},
        {"text": np.array(["red", "blue"]), "label": np.array(["1", "2"])},
        [" red", "blue "],
    ],
)
def test_options_come_in_many_forms(value):
    assert options_of(value).texts == ["red", "blue"]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_options(value):
    assert options_of(value) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["one"], "at least two"),
        ("red, blue", "as JSON"),
        (7, "must be a list of texts"),
        ([["a"], "b"], "must be a list of texts"),
        (["a", " "], "none empty"),
        ({"text": ["a", "b"], "label": ["A"]}, "each with its label"),
    ],
)
def test_what_is_no_list_of_options_is_said(value, message):
    with pytest.raises(ValueError, match=message):
        options_of(value)


def test_an_answer_is_a_text_or_a_label():
    plain = options_of(["red", "blue"])
    assert [resolve_answer(a, plain) for a in ("blue", "B", " A ")] == ["blue", "blue", "red"]
    named = options_of({"text": ["red", "blue"], "label": ["1", "2"]})
    assert resolve_answer("2", named) == "blue"
    with pytest.raises(ValueError, match=r"one of the choices \['red', 'blue'\], got 'C'"):
        resolve_answer("C", plain)


def frame_of(**columns):
    raw = pd.DataFrame(
        {"prompt": ["p"], "response": ["blue"]} | {k: [v] for k, v in columns.items()}
    )
    return canonical_frame(raw, "rows")[0].iloc[0]


def test_rows_with_choices_are_scored_by_them():
    row = frame_of(choices=["red", "blue"])
    assert (row["scorer"], row["answer"], row["choices"]) == ("choices", "blue", ["red", "blue"])
    row = frame_of(choices=["red", "blue"], answer="A")
    assert (row["answer"], row["response"]) == ("red", "blue")


def test_a_row_may_name_another_scorer():
    row = frame_of(choices=["red", "blue"], scorer="letter", answer="B")
    assert (row["scorer"], row["answer"]) == ("letter", "B")


def test_an_answer_outside_the_choices_is_a_bad_row():
    with pytest.raises(DataError, match="rows, row 0: answer must be one of the choices"):
        frame_of(choices=["red", "green"])
