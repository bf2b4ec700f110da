import pytest

from tclora.errors import ConfigError
from tclora.evaluate.sandbox.judge import SandboxError
from tclora.evaluate.scorers import Expected, check_leave, check_scorer, score
from tclora.evaluate.scorers.code import isolation, program_of

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (RIGHT, RIGHT),
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.", f"{RIGHT}\n"),
        (f"```\nx\n```\nor\n```py\n{RIGHT}\n```", f"{RIGHT}\n"),
        (f"{RIGHT}\n\nThis function adds two numbers.", RIGHT),
        (f"```python\n{RIGHT}\n\ndef cut_", RIGHT),
        ("I do not know.", "I do not know."),
        ("", ""),
    ],
)
def test_the_program_in_a_text(text, wanted):
    assert program_of(text).strip() == wanted.strip()


@pytest.mark.usefixtures("walls")
@pytest.mark.parametrize(
    ("scorer", "text", "wanted"),
    [
        ("unit-tests", RIGHT, 1),
        ("unit-tests", f"Sure!\n```python\n{RIGHT}\n```", 1),
        ("unit-tests", WRONG, 0),
        ("unit-tests", "no program", 0),
        ("unit-tests:continue", "    return a + b\n\nprint(1)", 1),
        ("unit-tests:continue", "    return a - b", 0),
    ],
)
def test_programs_are_judged_by_their_tests(scorer, text, wanted):
    assert score(scorer, text, Expected(TESTS, prompt="def add(a, b):\n")) == wanted


@pytest.mark.parametrize("answer", ["", "42 apples", "# nothing"])
def test_an_answer_that_is_no_tests_is_refused(answer):
    with pytest.raises(ValueError, match="'unit-tests' needs tests in Python as the answer"):
        check_scorer("unit-tests", Expected(answer))


def test_a_row_cannot_weaken_the_walls():
    with pytest.raises(ValueError, match="'unit-tests' takes no argument but 'continue'"):
        check_scorer("unit-tests:process", Expected(TESTS))


def test_the_user_can(monkeypatch):
    assert isolation() == "full"
    monkeypatch.setenv("TCLORA_CODE_ISOLATION", "process")
    assert isolation() == "process"
    monkeypatch.setenv("TCLORA_CODE_ISOLATION", "none")
    with pytest.raises(ConfigError, match=r"TCLORA_CODE_ISOLATION must be one of .*'none'"):
        isolation()


def test_leave_is_refused_where_the_machine_has_no_walls(monkeypatch):
    def fail(*_):
        raise SandboxError("programs cannot be shut in here")

    monkeypatch.setattr("tclora.evaluate.scorers.code.check_isolation", fail)
    with pytest.raises(SandboxError, match="cannot be shut in"):
        check_leave(["unit-tests"], allowed=True, remedy="-")
    with pytest.raises(ConfigError, match="'unit-tests' runs code written by the model; ask"):
        check_leave(["unit-tests"], allowed=False, remedy="ask")


def test_what_runs_in_the_sandboxes_counts_in_a_stages_key():
    """The supervisor is started by its name; its source must be followed all the same."""
    from tasks.closure import closure
    from tasks.definitions import Symbol

    found = closure([score], ["unit-tests"]).definitions
    for module, name in (("confine", "confine"), ("program", "main"), ("syscalls", "forbid_calls")):
        assert Symbol(f"tclora.evaluate.sandbox.{module}", name) in found
