"""How the process of a job is started: forked from one that has the imports, or from nothing.

Importing torch and transformers takes seconds of a core, so that jobs of a small model would spend
more on it than on their work. `tclora.jobs.fork_server` pays it once for all jobs of a process.
CUDA cannot be used in a copy of a process that has looked for GPUs, which libraries do where they
please; so jobs with a GPU start from nothing, and so do all where the system is not Linux, and any
that the server refuses: one whose source has changed since, or cannot be imported.
"""

import atexit
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Protocol, Self

from tclora.jobs.devices import THREADS
from tclora.jobs.fork_server import Request

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_OF_EVERY_TEST = "PYTEST_CURRENT_TEST"  # set anew within a process, and read by no library


class Process(Protocol):
    """A process of a job.

    Attributes
    ----------
    stdin, stdout : text files
        Its other ends.
    """

    stdin: IO[str] | None
    stdout: IO[str] | None

    def wait(self) -> int:
        """Wait for its end; return its exit code, or the signal that has ended it times -1."""

    def kill(self) -> None:
        """Kill it, unless it has ended."""


class Limits(NamedTuple):
    """What ends a job before its own end.

    Attributes
    ----------
    stopped : Event
        Set when no job is wanted any more.
    until : float or None
        Point of time (s, of `time.monotonic`).
    """

    stopped: threading.Event
    until: float | None = None

    def reached(self) -> bool:
        """Whether it must end."""
        return self.stopped.is_set() or (self.until is not None and time.monotonic() > self.until)


def start_process(
    spec: Path,
    module: str,
    environment: Mapping[str, str],
    errors: BinaryIO,
    limits: Limits,
    *,
    gpus: bool,
) -> Process:
    """Start the process of a job.

    Parameters
    ----------
    spec : Path
        File of its call.
    module : str
        Of its function.
    environment : Mapping[str, str]
        What differs from this process's.
    errors : binary file
        Its standard error.
    limits : Limits
        They end waiting for imports too; the process then starts from nothing, to be killed.
    gpus : bool
        Whether it has GPUs.

    Returns
    -------
    Process
    """
    if sys.platform == "linux" and not gpus:
        request = Request(str(spec), module, dict(environment))
        if process := _SERVERS.fork(request, errors, limits):
            return process
        logger.info("the job of %s starts from nothing: its fork server has refused it", spec)
    return subprocess.Popen(
        [sys.executable, "-m", "tclora.jobs.worker", str(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **environment},
    )


class _Forked:
    """A process that a server has forked.

    Parameters
    ----------
    descriptor : int
        Of the process: unlike its id, it never becomes another one's.
    told : socket
        Where the server tells how it ended.
    stdin, stdout : text files
        Its other ends.
    """

    def __init__(
        self, descriptor: int, told: socket.socket, stdin: IO[str], stdout: IO[str]
    ) -> None:
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self._descriptor, self._told = descriptor, told
        self._code: int | None = None
        self._lock = threading.Lock()

    def wait(self) -> int:
        """Wait for its end; return its exit code, or the signal that has ended it times -1."""
        if self._code is None:
            told = self._told.recv(64)
            with self._lock:
                # A server that was killed tells nothing. The job has closed its output by now.
                self._code = int(told) if told else -signal.SIGKILL
                self._told.close()
                os.close(self._descriptor)
        return self._code

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with self._lock, suppress(ProcessLookupError):
            if self._code is None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


@dataclass(frozen=True)
class _Server:
    """A fork server, for jobs with the environment and folder that it was started with."""

    environment: dict[str, str]
    folder: Path
    requests: socket.socket
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, environment: dict[str, str], folder: Path) -> Self:
        """Start a server."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tclora.jobs.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment | dict.fromkeys(THREADS, "1"),  # none that a copy would miss
            )
        return cls(environment, folder, ours, process)


@dataclass
class _Servers:
    """The fork server of this process; where environment or folder change, another is started."""

    server: _Server | None = None
    retired: list[_Server] = field(default_factory=list)  # they end after their last job
    # Held while a job is asked for: a copy of this process that was made then would keep the job's
    # ends of its pipes open.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fork(self, request: Request, errors: BinaryIO, limits: Limits) -> _Forked | None:
        """Return the process of a job, or nothing where none could be had this way."""
        with ExitStack() as held:
            with self.lock:
                told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                held.enter_context(told)
                stdin, to_stdin = os.pipe()
                from_stdout, stdout = os.pipe()
                stdin_end = held.enter_context(os.fdopen(to_stdin, "w"))
                stdout_end = held.enter_context(os.fdopen(from_stdout))
                try:
                    files = [stdin, stdout, errors.fileno(), theirs.fileno()]
                    server = self._sent(json.dumps(asdict(request)).encode(), files)
                finally:
                    theirs.close()
                    os.close(stdin)
                    os.close(stdout)
            if (descriptor := _told_first(told, limits)) is not None:
                held.pop_all()
                return _Forked(descriptor, told, stdin_end, stdout_end)
            if limits.reached() and not limits.stopped.is_set():
                server.process.kill()  # its imports hang
        return None

    def _sent(self, message: bytes, files: list[int]) -> _Server:
        environment = {k: v for k, v in os.environ.items() if k != _OF_EVERY_TEST}
        folder = Path.cwd()
        self.retired = [server for server in self.retired if server.process.poll() is None]
        known = self.server
        if known and (known.environment, known.folder) == (environment, folder):
            with suppress(OSError):  # it has ended
                socket.send_fds(known.requests, [message], files)
                return known
        self._retire()
        self.server = started = _Server.start(environment, folder)
        socket.send_fds(started.requests, [message], files)
        return started

    def close(self) -> None:
        """End all servers, and with the end of this process all jobs."""
        with self.lock:
            self._retire()
            for server in self.retired:
                server.process.kill()
                server.process.wait()
            self.retired = []

    def forget(self) -> None:
        """Let go, in a copy of this process, of the original's servers.

        It keeps its ends of the pipes of jobs that run: should the original be killed, they go on
        until the copy ends.
        """
        self._retire()
        for server in self.retired:
            server.process.returncode = 0  # no child of ours, to be waited for
        self.retired = []
        self.lock.release()

    def _retire(self) -> None:
        if self.server:
            self.server.requests.close()
            self.retired.append(self.server)
            self.server = None


def _told_first(told: socket.socket, limits: Limits) -> int | None:
    """Return a process's descriptor; nothing if it was refused or is not wanted any more."""
    told.settimeout(_POLL_SECONDS)
    while not limits.reached():
        with suppress(TimeoutError):
            _, descriptors, _, _ = socket.recv_fds(told, 64, 1)
            told.settimeout(None)
            return descriptors[0] if descriptors else None
    return None


_SERVERS = _Servers()
atexit.register(_SERVERS.close)
if hasattr(os, "register_at_fork"):  # a copy of this process has a server of its own
    os.register_at_fork(
        before=_SERVERS.lock.acquire,
        after_in_parent=_SERVERS.lock.release,
        after_in_child=_SERVERS.forget,
    )
