import pytest

from tclora.errors import ConfigError
from tclora.evaluate.scorers import (
    CHOICES,
    Expected,
    check_leave,
    check_scorer,
    default_scorer,
    register,
    score,
    scorers,
)
from tclora.evaluate.scorers.text import last_number


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
        ("after:####", "no, it is 4\n#### Yes.\nmore", "yes", 1),
        ("after:####", "#### no\n#### yes", "yes", 1),
        ("after:####", "yes", "yes", 0),
        ("after:####", "yes ####", "yes", 0),
        (r"regex:is (\w+)", "it is red, it is blue", "blue", 1),
        (r"regex:is (\w+)", "it is red, it is blue", "red", 0),
        (r"regex:[a-c]+", "xx abc", "ABC", 1),
        (r"regex:[a-c]+", "xx", "", 0),
        ("f1", "The cat sat.", "a cat sat", 1),
        ("f1", "cat", "cat dog", 2 / 3),
        ("f1", "cat cat", "cat dog", 0.5),
        ("f1", "bird", "cat", 0),
        ("f1", "", "the", 1),
    ],
)
def test_scores(scorer, generated, answer, wanted):
    assert score(scorer, generated, Expected(answer)) == pytest.approx(wanted)


OPTIONS = ("(A) a red one", "(B) a blue one", "(C) none")


@pytest.mark.parametrize(
    ("generated", "wanted"),
    [
        ("(B) a blue one", 1),
        ("B", 1),
        ("B.", 1),
        ("The answer is B because A is wrong.", 1),
        ("Answer: (B)", 1),
        ("A dog barks.\nAnswer: B", 1),
        ("A dog barks.\nANSWER IS: B", 1),
        ("A dog barks.\n**Answer:** B", 1),
        ("A dog barks. The correct answer is **(B)**.", 1),
        ("A dog barks. Answer: **Option B**", 1),
        ("A dog barks.\nAnswer: b", 0),
        ("(A) or (B)? The answer is (B).", 1),
        ("A", 0),
        ("I think A", 0),
        ("b", 0),
        ("", 0),
    ],
)
def test_the_letter_of_an_option(generated, wanted):
    assert score("letter", generated, Expected(OPTIONS[1], choices=OPTIONS)) == wanted


def test_letters_count_the_options_where_these_carry_none():
    options = ("A dog", "A cat")
    assert score("letter", "B", Expected("A cat", choices=options)) == 1
    assert score("letter", "A", Expected("A dog", choices=options)) == 1
    assert score("letter", "(C)", Expected("C")) == 1
    assert score("letter", "ANSWERS: C", Expected("C")) == 1


def test_overlap_equals_the_libraries_own_figures():
    """Worked by hand: 3 of 4 words in order on either side; a copy scores one everywhere."""
    expected = Expected("the cat sat down")
    assert score("rouge", "the cat lay down", expected) == pytest.approx(0.75)
    assert score("rouge:rouge2", "the cat lay down", expected) == pytest.approx(1 / 3)
    for scorer in ("rouge", "rouge:rouge1", "chrf", "bleu"):
        assert score(scorer, expected.answer, expected) == pytest.approx(1)
        assert 0 <= score(scorer, "nothing alike", expected) < 0.2
    assert 0.3 < score("chrf", "the cats sat down there", expected) < 1


@pytest.mark.parametrize(
    ("scorer", "expected", "message"),
    [
        ("blue", Expected("a"), r"scorer must be a registered name, got 'blue'; did you mean bleu"),
        ("after", Expected("a"), "must be given a mark"),
        ("regex:(", Expected("a"), "must be given a pattern"),
        ("regex:(a)(b)", Expected("a"), "at most one group"),
        ("rouge:rouge9", Expected("a"), "must name one of"),
        ("letter", Expected("a"), "needs an answer that is one of the choices"),
        (CHOICES, Expected("a"), "needs a row with choices"),
        ("reasoning-gym:nothing", Expected("a"), "nothing"),
        ("reasoning-gym:chain_sum", Expected("a", metadata="{"), "Expecting"),
    ],
)
def test_what_cannot_be_scored_is_said_before(scorer, expected, message):
    with pytest.raises(ValueError, match=message):
        check_scorer(scorer, expected)


def test_what_can_be_scored_passes():
    for scorer in ("exact", "number", "f1", "chrf", "bleu", "rouge:rougeL", "after:=", "regex:a"):
        check_scorer(scorer, Expected("a"))
    check_scorer(CHOICES, Expected("a", choices=("a", "b")))
    check_scorer("letter", Expected("b", choices=("a", "b")))


def test_a_missing_library_is_named(monkeypatch):
    from tclora.evaluate.scorers import overlap

    overlap._library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"need sacrebleu: pip install tclora\[metrics\]"):
        check_scorer("chrf", Expected("a"))


def test_every_scorer_has_a_summary():
    assert all(scorers.summary(name) for name in scorers)


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


def test_the_default_looks_at_response_and_choices():
    assert default_scorer("no", "It is hot.\n#### no") == "after:####"
    assert default_scorer("7", "3 + 4\n#### 7") == "number"
    assert default_scorer("b", "b", ["a", "b"]) == CHOICES
    assert default_scorer("7", "7", ["6", "7"]) == CHOICES
    assert default_scorer("b", "b", ["a", "c"]) == "exact"


def test_code_runs_with_leave_alone(monkeypatch):
    monkeypatch.setattr(scorers, "_entries", dict(scorers._entries))
    register("runs", executes_code=True)(lambda generated, expected: 1.0)
    check_leave(["exact", CHOICES, "regex:a"], allowed=False, remedy="-")
    check_leave(["runs:now"], allowed=True, remedy="-")
    with pytest.raises(ConfigError, match="'runs' runs code written by the model; ask"):
        check_leave(["exact", "runs:now"], allowed=False, remedy="ask")
