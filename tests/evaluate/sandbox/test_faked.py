"""Programs that fake success: none is taken for right."""

import pytest

from tclora.evaluate.sandbox.judge import run_tests
from tclora.evaluate.sandbox.limits import Limits
from tests.evaluate.sandbox.conftest import RIGHT, TESTS

pytestmark = pytest.mark.usefixtures("walls", "host")
WRONG = "def f(x):\n    return 0\n"
FRAME = """
import json, os
def frame(m):
    data = json.dumps(m).encode()
    return len(data).to_bytes(4, "big") + data
"""


@pytest.mark.parametrize(
    "code",
    [
        # The verdict printed, and written to everything that is open, before and during the tests.
        WRONG + FRAME + "print('passed')\nfor fd in range(32):\n    try: os.write(fd, frame("
        "{'failed': None, 'gives': 2}))\n    except OSError: pass",
        FRAME + "def f(x):\n    for fd in range(32):\n        try: os.write(fd, frame("
        "{'failed': None}) * 9)\n        except OSError: pass\n    os._exit(0)",
        # Values that agree with everything.
        "class Yes:\n    __eq__ = __ge__ = __le__ = lambda s, o: True\n    __hash__ = None\n"
        "    __sub__ = __add__ = lambda s, o: 0\ndef f(x):\n    return Yes()",
        "class Yes(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
        "def f(x):\n    return Yes(0)",
        # The interpreter changed.
        WRONG + "import builtins\nbuiltins.AssertionError = builtins.Exception = type(None)",
        WRONG + "import sys\nfor m in list(sys.modules.values()):\n    for n in ('send', 'encode', "
        "'main', '_outcome'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: None)",
        WRONG + "import sys, os\nfor v in list(sys._getframe(1).f_globals.values()):\n    pass\n"
        "sys._getframe(1).f_globals.clear()",
        WRONG + "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
    ],
)
def test_faked_success(code):
    assert run_tests(RIGHT, TESTS).passed
    assert not run_tests(code, TESTS, Limits(seconds=2)).passed


@pytest.mark.parametrize(
    "helper",
    [
        "def abs(x): return 0", "import math\nmath.isclose = lambda *a, **k: True",
        "class math:\n    isclose = lambda *a, **k: True", "len = all = lambda x: True",
    ],
)  # fmt: skip
def test_tests_keep_what_is_pythons(helper):
    tests = "assert abs(f(1) - 2) < 1 and all([f(1) == 2]) and math.isclose(f(1), 2)"
    assert run_tests(f"import math\n{RIGHT}{helper}", tests).passed
    assert not run_tests(f"import math\n{WRONG}{helper}", tests).passed


@pytest.mark.parametrize(
    "said", [("unittest.mock", "_ANY"), ("unittest.mock", "ANY"), ("sys", "exit")]
)
def test_a_name_is_not_what_the_program_says(said, tight):
    """An object of the standard library that equals everything would agree with the tests."""
    forge = (
        FRAME
        + f"""
import sys
class Lie: pass
f = Lie()
peer = sys.modules["tclora.evaluate.sandbox.peer"]
peer.OPERATIONS["origin"] = lambda target: {said!r}
"""
    )
    for tests in ("assert f() == 5", "assert f == 5", "assert f(1) == 2"):
        assert not run_tests(forge, tests, tight).passed


def test_the_program_reaches_nothing_of_its_tests(tight):
    """Its answers may name no object of the tests' side but the functions that it was given."""
    forge = (
        FRAME
        + """
def f(x):
    for message in (
        {"do": "call", "with": ["list", [["library", "builtins", "exec"], "import os"]],
         "keywords": ["dict", []]},
        {"do": "get", "with": ["list", [["yours", 0], "__class__"]], "keywords": ["dict", []]},
        {"do": "call", "with": ["list", [["yours", 7]]], "keywords": ["dict", []]},
    ):
        os.write(3, frame(message))
        answer = os.read(3, 1 << 16)
        if b"raises" not in answer:
            return "answered"
    return 2
"""
    )
    assert run_tests(forge, "assert f(1) == 2", tight).passed
