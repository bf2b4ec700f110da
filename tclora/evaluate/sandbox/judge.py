"""`run_tests`: is a program right? Two sandboxes, started, joined and ended from here."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import tclora
from tclora.errors import TcloraError
from tclora.evaluate.sandbox import supervisor
from tclora.evaluate.sandbox.limits import Isolation, Limits
from tclora.evaluate.sandbox.values import receive, send

# As isolated as -I, but for the one variable that makes the order of sets the same every time.
_PYTHON = (sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
USUAL = Limits()
VARIABLE = "TCLORA_CODE_ISOLATION"  # of the environment: an isolation that the user accepts
_START = (
    "import sys; root = sys.argv.pop(); sys.path.insert(0, root); "
    f"from {supervisor.main.__module__} import main; sys.path.remove(root); main()"
)


class SandboxError(TcloraError):
    """Programs cannot be shut in on this machine."""


@dataclass(frozen=True)
class Verdict:
    """What came of a program's tests.

    Attributes
    ----------
    passed : bool
        Whether all of the tests ran, and none failed.
    reason : str
        Why it did not pass; empty where it did.
    output : str
        What the program printed, as far as it was kept.
    """

    passed: bool
    reason: str = ""
    output: str = ""


def run_tests(
    code: str, tests: str, limits: Limits = USUAL, *, isolation: Isolation = "full"
) -> Verdict:
    """Run a program that nobody vouches for, and unit tests on its functions, in two sandboxes.

    Parameters
    ----------
    code : str
        A Python program.
    tests : str
        Python code that raises unless the program is right, such as lines of ``assert``; it may use
        the program's names.
    limits : Limits
        What each sandbox may use.
    isolation : "full" or "process"
        What walls there are; see `tclora.evaluate.sandbox.limits`.

    Returns
    -------
    Verdict
        The same for the same program and tests, as far as the program is deterministic.

    Raises
    ------
    SandboxError
        If this machine does not offer the isolation; nothing has been run then.

    Notes
    -----
    Arguments and results are values of Python's usual types; changes of lists, dictionaries and
    sets among the arguments come back. Other objects of the program stay with it: tests may call
    them, read and set their attributes and walk through them, but they equal no value. What a
    program says itself it is believed: helpers that tests take from it, relations among its own
    objects.
    """
    order = {"limits": limits._asdict(), "isolation": isolation}
    near, far = socket.socketpair()
    read, write = os.pipe()
    # The program never sees the tests, nor holds the pipe that their outcome comes through.
    with (
        os.fdopen(read, "rb") as outcome,
        _sandbox(order | {"role": "program", "text": code}, near.detach()) as program,
        _sandbox(order | {"role": "tests", "text": tests}, far.detach(), write) as examiner,
    ):
        examined, ended = examiner.report(), program.stop()
        try:
            failed = receive(outcome.fileno())["failed"]
        except EOFError:
            failed = f"the tests: {_end(examined, limits)}"
    if failed and "the program ended" in failed and ended["cause"] != "stopped":
        failed = f"{failed}: it {_end(ended, limits)}"
    return Verdict(not failed, failed or "", ended["output"])


def check_isolation(isolation: Isolation = "full") -> None:
    """Try whether this machine can shut programs in.

    Raises
    ------
    SandboxError
        If it cannot.
    """
    verdict = run_tests("def one():\n    return 1", "assert one() == 1", isolation=isolation)
    if not verdict.passed:
        raise SandboxError(f"a sandbox must run a program of one line, got: {verdict.reason}")


@dataclass(frozen=True)
class _Sandbox:
    """A sandbox that was started: its supervisor, and the pipes to it and from it."""

    process: subprocess.Popen[bytes]
    orders: IO[bytes]
    reports: IO[bytes]

    def report(self) -> dict[str, Any]:
        """Wait for the end; return how it came.

        Raises
        ------
        SandboxError
            If the sandbox could not be made.
        """
        try:
            report: dict[str, Any] = receive(self.reports.fileno())
            problem = report["setup"]
        except EOFError:
            problem = f"its supervisor ended with code {self.process.wait()}"
        if problem:
            raise SandboxError(
                f"programs cannot be shut in here: {problem.splitlines()[-1]}; use a machine that "
                f"allows namespaces, or accept weaker walls by ${VARIABLE}=process"
            )
        return report

    def stop(self) -> dict[str, Any]:
        """Bring the end about, and all that was started in the sandbox to its end."""
        self.orders.close()
        return self.report()


@contextmanager
def _sandbox(order: dict[str, Any], *descriptors: int) -> Iterator[_Sandbox]:
    """Start a sandbox that gets these descriptors, which are closed here; end it with the block."""
    with tempfile.TemporaryDirectory(prefix="tclora-sandbox-") as folder:
        process = subprocess.Popen(
            [*_PYTHON, _START, str(Path(tclora.__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_ENVIRONMENT,
            pass_fds=descriptors,
        )
        for descriptor in descriptors:
            os.close(descriptor)
        with process:  # leaving it closes the pipe of orders: a sign to end all
            orders, reports = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            send(orders.fileno(), order | {"descriptors": descriptors, "folder": folder})
            yield _Sandbox(process, orders, reports)


def _end(report: dict[str, Any], limits: Limits) -> str:
    """Say how a sandbox ended."""
    ends = {
        "time": f"took more than {limits.seconds:g} s",
        "output": f"printed more than {limits.output_bytes} bytes",
        "stopped": "did not answer",
    }
    code = report["code"]
    if report["cause"] in ends:
        return ends[report["cause"]]
    if code < 0:
        return f"was killed by signal {-code}"
    return f"ended with exit code {code}"
