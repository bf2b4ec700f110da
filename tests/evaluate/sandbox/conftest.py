"""A host that programs must not harm, limits that they reach soon, a program and its tests."""

import ctypes
from pathlib import Path

import psutil
import pytest

from tclora.evaluate.sandbox.limits import Limits

_PR_SET_CHILD_SUBREAPER = 36
ESCAPES = [f"{place}/tclora-escaped" for place in ("", "/dev", "/root", "/tmp", "/usr/lib", "/var")]
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(41) == 42\n"


@pytest.fixture
def host(tmp_path):
    """What must not change: a file that anyone may write, its folder, the processes below us."""
    before = psutil.Process().children(recursive=True)  # another test's server may live longer
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a daemon would come to us
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    yield kept
    assert [p for p in psutil.Process().children(recursive=True) if p not in before] == []
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [kept]
    assert not [name for name in ESCAPES if Path(name).exists()]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def tight():
    """Limits that hostile programs reach soon."""
    return Limits(
        seconds=3, cpu_seconds=1, memory=512 << 20, file_bytes=1 << 20, disk_bytes=4 << 20
    )
