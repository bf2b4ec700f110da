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


def test_last_number():
    assert last_number("from 3 to -1,000.5") == -1000.5
    assert last_number("none") is None


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("12", "number"), (" -1,204.5 ", "number"), ("cat", "exact"), ("12 cats", "exact")],
)
def test_default_scorer(answer, wanted):
    assert default_scorer(answer) == wanted
