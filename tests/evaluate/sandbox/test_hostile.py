"""Programs that mean harm: every one is contained, and the host is as it was."""

import socket
import textwrap
import time

import pytest

from tclora.evaluate.sandbox.judge import run_tests
from tclora.evaluate.sandbox.limits import Limits
from tests.evaluate.sandbox.conftest import ESCAPES, RIGHT, TESTS

pytestmark = pytest.mark.usefixtures("walls", "host")


def saw(code, wanted, limits):
    """Run a program that tells by `attempt` what it met; the verdict on that."""
    return run_tests(code, f"assert attempt() == {wanted!r}, attempt()", limits)


def test_a_fork_bomb(tight):
    bomb = """
import os
children = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
        children += 1
    except OSError:
        break
def attempt():
    return children
"""
    verdict = run_tests(bomb, f"assert attempt() < {tight.processes}, attempt()", tight)
    assert verdict.passed, verdict


def test_a_memory_bomb(tight):
    code = """
def attempt():
    try:
        return len(bytearray(1 << 30))
    except MemoryError:
        return "refused"
"""
    assert saw(code, "refused", tight).passed
    assert not run_tests(
        f"{RIGHT}x = []\nwhile True:\n    x.append(bytes(1 << 20))", TESTS, tight
    ).passed


@pytest.mark.parametrize(
    "call",
    [
        "os.memfd_create('m')",
        "ctypes.CDLL(None, use_errno=True).shmget(0, 1 << 20, 0o1600)",
        "ctypes.CDLL(None, use_errno=True).syscall(425, 1, None)",  # io_uring_setup
        "ctypes.CDLL(None, use_errno=True).unshare(0x10000000)",  # a user namespace
        "ctypes.CDLL(None, use_errno=True).ptrace(0, 0, 0, 0)",
    ],
)
def test_calls_beside_the_limits(tight, call):
    code = f"""
import ctypes, errno, os
def attempt():
    try:
        if {call} >= 0:
            return "allowed"
        return errno.errorcode[ctypes.get_errno()]
    except OSError as error:
        return errno.errorcode[error.errno]
"""
    verdict = saw(code, "EPERM", tight)
    assert verdict.passed, verdict


def test_files_outside(tight, host):
    code = f"""
import os
def attempt():
    found = []
    for name in ({str(host)!r}, *{[name for name in ESCAPES if name[:4] != "/tmp"]}):
        try:
            with open(name, "w") as file:
                file.write("changed")
            found.append(name)
        except OSError:
            pass
    for name in ({str(host.parent)!r}, "/etc", "/proc", "/sys", "/home", "/var"):
        found += [name] if os.path.exists(name) else []
    return found
"""
    verdict = saw(code, [], tight)
    assert verdict.passed, verdict


def test_a_folder_of_its_own(tight):
    code = """
import os
def attempt():
    before = os.listdir()
    with open("mine", "w") as file:
        file.write("x")
    return before, os.listdir(), os.getcwd()
"""
    assert saw(code, ([], ["mine"], "/tmp"), tight).passed
    assert saw(code, ([], ["mine"], "/tmp"), tight).passed  # nothing is left of the first


def test_a_huge_file(tight):
    code = f"""
def attempt():
    written = 0
    try:
        with open("huge", "wb", buffering=0) as file:
            while written < {tight.disk_bytes * 4}:
                written += file.write(bytes(1 << 16))
    except OSError as error:
        return written <= {tight.file_bytes}
def several():
    try:
        for i in range(1000):
            with open(str(i), "wb") as file:
                file.write(bytes(1 << 19))
    except OSError:
        return i * (1 << 19) <= {tight.disk_bytes}
"""
    verdict = run_tests(code, "assert attempt() and several()", tight)
    assert verdict.passed, verdict


def test_open_files(tight):
    code = """
def attempt():
    files = []
    try:
        while True:
            files.append(open("/dev/null"))
    except OSError:
        return len(files)
"""
    assert run_tests(code, f"assert attempt() < {tight.open_files}", tight).passed


def test_sockets(tight):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = f"""
import socket
def attempt():
    found = []
    for act in (
        lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1),
        lambda: socket.create_server(("127.0.0.1", 0)),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
    ):
        try:
            act()
            found.append("allowed")
        except OSError as error:
            found.append(type(error).__name__)
    return found
"""
        verdict = saw(code, ["PermissionError"] * 4, tight)
        with pytest.raises(TimeoutError):
            server.accept()
    assert verdict.passed, verdict


IGNORE = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""


@pytest.mark.parametrize("place", ["before", "in"])
@pytest.mark.parametrize("act", ["while True: pass", "import time; time.sleep(3600)", IGNORE])
def test_no_end(tight, act, place):
    code = act if place == "before" else f"def f(x):\n{textwrap.indent(act, '    ')}"
    verdict = run_tests(code, TESTS, tight._replace(seconds=1.5))
    assert not verdict.passed
    assert "was killed by signal 9" in verdict.reason or "took more than 1.5 s" in verdict.reason


@pytest.mark.parametrize(
    "act", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "exit()"]
)
@pytest.mark.parametrize("place", ["before", "in"])
def test_an_early_end_is_no_success(act, place):
    code = f"{RIGHT}{act}" if place == "before" else f"def f(x):\n    {act}"
    assert not run_tests(code, TESTS).passed


def test_killing_others(tight):
    code = """
import os, signal
def attempt():
    os.kill(os.getppid(), signal.SIGKILL) if os.getppid() else None
    for pid in range(2, 4000):
        try:
            os.kill(pid, signal.SIGKILL)
            return pid
        except ProcessLookupError:
            pass
    return os.getpid(), os.getppid()
"""
    assert saw(code, (1, 0), tight).passed  # alone in its world
    assert not run_tests(
        "import os\nos.kill(-1, 9)\nos.kill(0, 9)\n" + RIGHT, "assert f(1) == 3"
    ).passed


def test_a_flood_of_output():
    limits = Limits(seconds=5, output_bytes=10_000)
    verdict = run_tests(f"{RIGHT}while True: print('x' * 1000)", TESTS, limits)
    assert not verdict.passed
    assert "printed more than 10000 bytes" in verdict.reason
    assert len(verdict.output) <= 10_000


def test_a_daemon(tight, host):
    code = f"""
import os, signal, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.closerange(0, 20)
            time.sleep(1)
            while True:
                try: open({str(host)!r}, "w").write("changed")
                except OSError: time.sleep(0.1)
        os._exit(0)
    return x + 1
"""
    verdict = run_tests(code, TESTS, tight._replace(processes=8))
    assert verdict.passed, verdict  # it is right; `host` sees that nothing is left of it
    time.sleep(1.2)


def test_secrets(tight, monkeypatch, host):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    code = f"""
import os, sys, glob
def attempt():
    found = dict(os.environ)
    for name in ("/proc/self/environ", "/proc/1/environ", "/etc/shadow", "/etc/passwd",
                 os.path.expanduser("~/.ssh/id_rsa"), "/root/.netrc", {str(host)!r}):
        try:
            found[name] = open(name).read()
        except OSError:
            pass
    homes = glob.glob("/root/.*") + glob.glob("/home/*")
    homes = [name for name in homes if not sys.prefix.startswith(name)]
    return found, homes, sys.argv[1:], sys.stdin.read() if sys.stdin else ""
"""
    verdict = saw(code, ({}, [], [], ""), tight)
    assert verdict.passed, verdict
