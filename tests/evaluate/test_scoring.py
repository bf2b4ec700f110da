import pytest

from tclora.evaluate.scoring import default_scorer, last_number, score


@pytest.mark.parametrize(
    ("scorer", "generated", "answer", "wanted"),
    [
        ("exact", "  The  Answer.\n", "the answer", 1),
        ("exact", "the answers", "the answer", 0),
        ("exact", "STRASSE", "straße", 1),
        ("number", "So it is 1,204 apples.", "1204", 1),
        ("number", "3 + 4 = 7", "7", 1),
        ("number", "7 = 3 + 4", "7", 0),
        ("number", "-2.50", "-2.5", 1),
        ("number", "none", "7", 0),
        ("number", "none", "none", 0),
    ],
)
def test_scores(scorer, generated, answer, wanted):
    assert score(scorer, generated, answer) == wanted


def test_an_unknown_scorer_is_refused():
    with pytest.raises(ValueError, match="scorer must be 'exact', 'number' or"):
        score("bleu", "a", "a")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from 3 to -1,000.5", -1000.5),
        ("none", None),
        ("1,234,567 in all.", 1234567),
        ("1,2,3", 3),  # a list: its last element
        ("12,34", 34),
        ("1,2345", 2345),
        ("1234,567", 567),
        ("[1000,2000,]", 2000),
        (".5", 0.5),
        ("-.25!", -0.25),
        ("it is .5.", 0.5),
        ("version 1.2.3", 3),
        ("3.", 3),
        ("10-7", 7),
        ("x-7", 7),
        ("3 - 7", 7),
        ("= -7", -7),
        ("$-7", -7),
        ("1e5", 5),
    ],
)
def test_last_number(text, wanted):
    assert last_number(text) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("12", "number"),
        (" -1,204.5 ", "number"),
        ("cat", "exact"),
        ("12 cats", "exact"),
        (".5", "number"),
        ("1,2,3", "exact"),
        ("1,23", "exact"),
        ("1.2.3", "exact"),
        ("1234567", "number"),
    ],
)
def test_default_scorer(answer, wanted):
    assert default_scorer(answer) == wanted
