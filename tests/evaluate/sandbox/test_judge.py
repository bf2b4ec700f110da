"""What tests and programs can say to each other, and how a verdict explains itself."""

import os
import platform
from collections import Counter, OrderedDict, deque
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from tclora.evaluate.sandbox.confine import unused_user
from tclora.evaluate.sandbox.judge import SandboxError, check_isolation, run_tests
from tclora.evaluate.sandbox.limits import Limits
from tclora.evaluate.sandbox.syscalls import MACHINES, forbid_calls
from tclora.evaluate.sandbox.values import decode, encode

walled = pytest.mark.usefixtures("walls")


def refuse(value):
    raise AssertionError(value)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**80), 1.5, float("inf"), "ä\ud800", [1, [2, (3,)]], {1, 2},
        frozenset("a"),
        {"a": {1: (2, 3)}, (1, 2): None}, b"\x00\xff", bytearray(b"x"), 1 + 2j, range(1, 9, 2),
        Decimal("0.10"), Fraction(1, 3), deque([1]), Counter("aab"), OrderedDict(b=1, a=2),
        datetime(2025, 1, 2, 3, 4, 5, 6), date(2025, 1, 2), {1: 2}.keys(),
    ],
)  # fmt: skip
def test_values_travel(value):
    found = decode(encode(value, refuse), refuse)
    assert found == value
    assert type(found) is type(value)


def test_instances_of_subclasses_become_the_usual_type():
    class Yes(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    assert type(decode(encode(Yes("no"), refuse), refuse)) is str


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x):\n    x.append(3)\n    x.sort()", "a = [9, 1]\nf(a)\nassert a == [1, 3, 9]"),
        ("def f(x):\n    x['k'] = {1}", "a = {}\nf(a)\nassert a == {'k': {1}}"),
        ("def f(g, x):\n    return [g(i) for i in x]", "assert f(lambda i: 2 * i, [1]) == [2]"),
        ("def f(g, x):\n    return g(x)", "assert f(len, 'abc') == 3 and f(max, [1, 5]) == 5"),
        ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2]"),
        ("def f(x):\n    return {'a': 1}[x]", "try:\n    f('b')\n    raise RuntimeError\n"
         "except KeyError:\n    pass"),
        ("class Odd(ValueError): pass\ndef f():\n    raise Odd('no')", "try:\n    f()\n"
         "    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
        ("class Node:\n    def __init__(self, v):\n        self.v, self.left = v, None\n"
         "def depth(n):\n    return 0 if n is None else 1 + depth(n.left)",
         "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.v == 2"),
        ("import re\ndef f(x):\n    return re.search('b', x)", "assert f('abc') and not f('x')"),
        ("import math\ndef f(x):\n    return math.sqrt(x)", "assert math.isclose(f(4), 2)"),
        ("from math import isclose\ndef f(x): return x / 3", "assert isclose(f(1), 1 / 3)"),
        ("def sum(a, b):\n    return a * b", "assert sum(2, 3) == 6"),
        ("i = 9\ndef sum(a, b): return a * b", "for i in (2, 3):\n    assert sum(i, 3) == i * 3"),
        ("def bisect(x):\n    return x // 2", "assert bisect(8) == 4"),
        ("from math import sqrt as f", "assert f(9) == 3"),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
         "@dataclass\nclass P:\n    x: int\ndef f():\n    return P(3)", "assert f().x == 3"),
        ("LIMIT = 7\ndef f(): return LIMIT", "assert f() == LIMIT == 7"),
        ("def f(a, b):\n    return a - b", "def check(candidate):\n"
         "    assert candidate(5, b=3) == 2\ncheck(f)"),
        ("def f(n):\n    return 7 ** n", "assert f(9000) == 7 ** 9000"),
        ("def f(x):\n    print('noise')\n    return x", "assert f('\\n') == '\\n'"),
        ("def f(x): return x\nif __name__ == '__main__':\n    input()", "assert f(1) == 1"),
        ("import heapq, collections, itertools\ndef f(x): return heapq.nsmallest(2, x)",
         "assert f([3, 1, 2]) == [1, 2]"),
        ("def f(a, b): return a is b", "x = Node = f\nassert f(x, x) and x is f"),
    ],
)  # fmt: skip
@walled
def test_right_programs_pass(code, tests):
    verdict = run_tests(code, tests)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        ("def f(x):\n    return x", "assert f(1) == 2, 'one more'", "AssertionError: one more"),
        ("def g(x):\n    return x", "assert f(1) == 2", "name 'f' is not defined"),
        ("def f(x:\n    return x", "assert f(1) == 2", "SyntaxError"),
        ("1 / 0", "assert f(1) == 2", "ZeroDivisionError"),
        ("def f(x):\n    return x.y", "assert f(1) == 2", "AttributeError"),
        ("def f(x): return x", "import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(3)", "assert f(1)", "its tests began: it ended with exit code 3"),
        ("import os\ndef f(x): os._exit(0)", "assert f(1)", "during its tests: it ended with exit"),
        ("import numpy", "assert True", "No module named 'numpy'"),
    ],
)  # fmt: skip
@walled
def test_a_failure_says_why(code, tests, reason):
    verdict = run_tests(code, tests)
    assert not verdict.passed
    assert reason in verdict.reason


@walled
def test_what_was_printed_is_kept():
    verdict = run_tests("print('here')\ndef f(): print('there')", "f()")
    assert verdict.output == "here\nthere\n"


@walled
def test_the_order_of_sets_is_the_same_every_time():
    code = "def f():\n    return list(set('abcdefghijklmnop'))"
    found = {run_tests(code, "print(f())\nassert f() == 0").reason for _ in range(3)}
    assert len(found) == 1
    orders = {run_tests(f"{code}\nprint(f())", "f()").output for _ in range(3)}
    assert len(orders) == 1


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_forbids_what_the_kernel_calls_so(machine):
    """Numbers of system calls are those of the kernel's headers, where they are installed."""
    header = {
        "x86_64": Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }[machine]
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    lines = [line.split() for line in header.read_text().splitlines()]
    numbers = {
        line[1].removeprefix("__NR_"): int(line[2])
        for line in lines
        if len(line) > 2 and line[1].startswith("__NR_") and line[2].isdigit()
    }
    table = MACHINES[machine]
    wanted = {**table.forbidden, "clone": table.clone, "clone3": table.clone3}
    assert {name: numbers[name] for name in wanted} == wanted
    assert table.forks == tuple(numbers[name] for name in ("fork", "vfork") if name in numbers)


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ("         0          0 4294967295\n", 2_000_000_007),
        ("0 1000 1\n1 100000 65536\n", 65534),  # a container without a user of its own to spare
    ],
)
def test_the_user_in_place_of_root(ids, wanted):
    assert unused_user(7, ids) == wanted


def in_a_child(act):
    """Run a function in a forked child; return whether it came to its end."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@walled
def test_without_namespaces_nothing_runs():
    """As on a machine that forbids them: refused by name, unless weaker walls are accepted."""

    def act():
        forbid_calls(allow_processes=True)
        with pytest.raises(SandboxError, match=r"unshare: .*TCLORA_CODE_ISOLATION=process"):
            run_tests("def f(): return 1", "assert f() == 1")

    assert in_a_child(act)


def test_weaker_walls():
    code = """
import os, socket
def attempt():
    found = []
    for act in (socket.socket, os.fork, lambda: os.kill(1, 0)):
        try:
            act()
            found.append("allowed")
        except Exception as error:
            found.append(type(error).__name__)
    return found, dict(os.environ), os.listdir()
"""
    wanted = (["PermissionError"] * 3, {}, [])
    limits = Limits(seconds=3, cpu_seconds=1)
    try:
        check_isolation("process")
    except SandboxError as error:
        pytest.skip(str(error))
    verdict = run_tests(
        code, f"assert attempt() == {wanted}, attempt()", limits, isolation="process"
    )
    assert verdict.passed, verdict
    verdict = run_tests("while True: pass", "assert True", limits, isolation="process")
    assert not verdict.passed
