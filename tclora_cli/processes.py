"""Processes of this machine that outlive the command that started them, remembered in one file.

A process is known by its number and the time it began: a number that another process has by now, or
had before the machine was started anew, is not taken for it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from tclora.files import write_text

Health = Callable[[], bool]
_PATIENCE = 15.0  # s that a process has to end by itself
_POLL = 0.1  # s
_DETACHED: list[subprocess.Popen[bytes]] = []  # Python takes one that is let go for forgotten


class Started(BaseModel):
    """A process that was started: its number, and when it began (s since 1970)."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> "Started":
        """Describe a process that runs."""
        return cls(pid=pid, began=psutil.Process(pid).create_time())

    @property
    def process(self) -> psutil.Process | None:
        """The process; None if it has ended."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.began) < 1
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    @property
    def survivors(self) -> list[psutil.Process]:
        """What it has started and left behind: the rest of its session, if it has ended."""
        if self.process is not None:
            return []
        return [p for p in psutil.process_iter() if _session(p) == self.pid]

    def end(self) -> bool:
        """End the process and those it has started; say whether any of them ran."""
        process = self.process
        first = self.survivors if process is None else [process]
        family = [*first, *(process.children(recursive=True) if process else [])]
        for part in first:
            _signal(part, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=_PATIENCE)
        for part in alive:
            _signal(part, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=_PATIENCE)
        _DETACHED[:] = [known for known in _DETACHED if known.poll() is None]
        return bool(family)


class Ledger(BaseModel):
    """What was started, by name, and how; the file ``machine.json``."""

    settings: dict[str, str] = {}
    started: dict[str, Started] = {}

    @classmethod
    def read(cls, file: Path) -> "Ledger":
        """Read it; empty where there is none."""
        return cls.model_validate_json(file.read_bytes()) if file.exists() else cls()

    def runs(self, name: str) -> bool:
        """Return whether what was started under a name runs."""
        started = self.started.get(name)
        return started is not None and started.process is not None

    def write(self, file: Path) -> None:
        """Write it whole."""
        write_text(file, self.model_dump_json(indent=2) + "\n")


def start(command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> Started:
    """Start a process that does not end with this one, its output appended to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _DETACHED.append(process)
    return Started.of(process.pid)


def flow_runs_here() -> set[str]:
    """Return the ids of the flow runs that have a process of this user on this machine."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
    return found


def last_lines(log: Path, count: int = 10) -> str:
    """Return the end of a log file."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.strip().splitlines()[-count:])


def wait_until(healthy: Health, started: Started, until: float) -> bool:
    """Wait until a process is healthy; False if it ends or the time (`time.monotonic`) comes first.

    What a process that has ended left behind may answer in its place, and does not count.
    """
    while started.process is not None:
        if healthy():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_POLL)
    return False


def _session(process: psutil.Process) -> int | None:
    """Return the number of a process's session; None if it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
