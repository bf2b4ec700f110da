"""Programs by their unit tests: ``unit-tests``, run in sandboxes (`tclora.evaluate.sandbox`).

It runs what the model wrote, so that rows which name it are measured only with leave; and it runs
it only behind full walls, unless the user accepts weaker ones by the environment variable
``TCLORA_CODE_ISOLATION=process``. A row cannot: its author may be anyone.
"""

import ast
import os
import re
from typing import cast, get_args

from tclora.errors import ConfigError
from tclora.evaluate.sandbox.judge import VARIABLE, check_isolation, run_tests
from tclora.evaluate.sandbox.limits import Isolation
from tclora.evaluate.scorers.registry import Expected, register

_FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_CONTINUE = "continue"


def isolation() -> Isolation:
    """Return the isolation that the user asks for by `VARIABLE`, "full" unless it is set.

    Raises
    ------
    ConfigError
        If there is no such isolation.
    """
    asked = os.environ.get(VARIABLE, "full")
    if asked not in get_args(Isolation):
        raise ConfigError(f"${VARIABLE} must be one of {get_args(Isolation)}, got {asked!r}")
    return cast(Isolation, asked)


def _check(expected: Expected) -> None:
    if expected.argument not in ("", _CONTINUE):
        raise ValueError(
            f"scorer 'unit-tests' takes no argument but {_CONTINUE!r}, got {expected.argument!r}"
        )
    try:
        tests = ast.parse(expected.answer).body
    except SyntaxError:
        tests = []
    if not tests:
        raise ValueError(
            f"scorer 'unit-tests' needs tests in Python as the answer, got {expected.answer!r:.60}"
        )


@register(
    "unit-tests",
    check=_check,
    executes_code=True,
    ready=lambda: check_isolation(isolation()),
)
def unit_tests(generated: str, expected: Expected) -> float:
    """Run the answer, unit tests in Python, on the program: 1 if all pass (in a sandbox).

    The program is the longest fenced block of the text, else the text, as far as it is Python; with
    ``unit-tests:continue`` it goes on from the prompt.
    """
    text = expected.prompt + generated if expected.argument == _CONTINUE else generated
    program = program_of(text)
    return float(run_tests(program, expected.answer, isolation=isolation()).passed)


def program_of(text: str) -> str:
    """Return the program in a text: its longest fenced block, else all of it.

    An answer may be cut off, or go on in words: what counts are its lines as far as they parse.
    Where none does, the text as it is.
    """
    lines = max(_FENCE.findall(text), key=len, default=text).splitlines()
    for end in range(len(lines), 0, -1):
        program = "\n".join(lines[:end])
        if _parses(program):
            return program
    return text


def _parses(program: str) -> bool:
    try:
        return bool(ast.parse(program).body)
    except (SyntaxError, ValueError):
        return False
