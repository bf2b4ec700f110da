"""How the process of a job is started: forked from one that has the imports, or from nothing.

Importing torch and transformers takes seconds of a core, so that jobs of a small model would spend
more on it than on their work. `tclora.jobs.fork_server` pays it once for all jobs of a process.
CUDA cannot be used in a copy of a process that has looked for GPUs, which libraries do where they
please; so jobs with a GPU start from nothing, and so do all where the system is not Linux.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Protocol, Self

from tclora.jobs.devices import THREADS
from tclora.jobs.fork_server import Request

_POLL_SECONDS = 0.2
_OF_A_TEST_RUNNER = "PYTEST_CURRENT_TEST"  # another value with every test


class Process(Protocol):
    """A process of a job.

    Attributes
    ----------
    stdin, stdout : text files
        Its other ends.
    returncode : int or None
        Its exit code, or the signal that has ended it times -1; nothing until it was waited for.
    """

    stdin: IO[str] | None
    stdout: IO[str] | None

    @property
    def returncode(self) -> int | None:
        """Its exit code once it was waited for."""

    def wait(self) -> int:
        """Wait for its end and return the exit code."""

    def kill(self) -> None:
        """Kill it, unless it has ended."""


def start_process(
    spec: Path,
    module: str,
    environment: Mapping[str, str],
    errors: BinaryIO,
    *,
    gpus: bool,
    stopped: threading.Event,
) -> Process:
    """Start the process of a job.

    Parameters
    ----------
    spec : Path
        File of its call.
    module : str
        Of its function.
    environment : Mapping[str, str]
        What differs from this process's, numbers of threads among it.
    errors : binary file
        Its standard error.
    gpus : bool
        Whether it has GPUs.
    stopped : Event
        Ends waiting for imports; then the process starts from nothing, which takes no time.
    """
    if sys.platform == "linux" and not gpus:
        request = Request(str(spec), module, str(Path.cwd()), dict(environment))
        if process := _SERVERS.fork(request, errors, stopped):
            return process
    return subprocess.Popen(
        [sys.executable, "-m", "tclora.jobs.worker", str(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **environment},
    )


class _Forked:
    """A process that the server has forked.

    Parameters
    ----------
    pid : int
        Its id.
    told : socket
        Where the server says how it ended.
    stdin, stdout : text files
        Its other ends.
    """

    def __init__(self, pid: int, told: socket.socket, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid, self._told = pid, told
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self.returncode: int | None = None

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self.returncode is None:
            with self._told as told:
                code = told.recv(64)
            # A server that was killed says nothing; the process has closed its output, or will be
            # killed by who calls this.
            self.returncode = int(code) if code else -signal.SIGKILL
        return self.returncode

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass
class _Server:
    """A fork server, for processes whose environment is the one it was started with."""

    environment: dict[str, str]
    requests: socket.socket
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, environment: dict[str, str]) -> Self:
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
        return cls(environment, ours, process)


@dataclass
class _Servers:
    """The fork server of this process; another one is started where the environment is another."""

    server: _Server | None = None
    retired: list[_Server] = field(default_factory=list)  # they end after their last job
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fork(self, request: Request, errors: BinaryIO, stopped: threading.Event) -> _Forked | None:
        """Return the process of a job, or nothing where none could be had this way."""
        told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        ours = [os.fdopen(to_stdin, "w"), os.fdopen(from_stdout)]
        files = [stdin, stdout, errors.fileno(), theirs.fileno()]
        try:
            self._send(json.dumps(asdict(request)).encode(), files)
        finally:
            theirs.close()
            os.close(stdin)
            os.close(stdout)
        pid = _first(told, stopped)
        if pid:
            return _Forked(int(pid), told, *ours)
        told.close()
        for file in ours:
            file.close()
        return None

    def _send(self, message: bytes, files: list[int]) -> None:
        environment = {k: v for k, v in os.environ.items() if k != _OF_A_TEST_RUNNER}
        with self.lock:
            self.retired = [server for server in self.retired if server.process.poll() is None]
            if self.server and self.server.environment == environment:
                with suppress(OSError):  # it has ended
                    socket.send_fds(self.server.requests, [message], files)
                    return
            self._retire()
            self.server = _Server.start(environment)
            socket.send_fds(self.server.requests, [message], files)

    def close(self) -> None:
        """End all servers, and with the end of this process all jobs."""
        with self.lock:
            self._retire()
            for server in self.retired:
                server.process.kill()
                server.process.wait()
            self.retired = []

    def _retire(self) -> None:
        if self.server:
            self.server.requests.close()
            self.retired.append(self.server)
            self.server = None


def _first(told: socket.socket, stopped: threading.Event) -> bytes:
    """Return what a server says first, or nothing if it has ended or the run was stopped."""
    told.settimeout(_POLL_SECONDS)
    while not stopped.is_set():
        with suppress(TimeoutError):
            answer = told.recv(64)
            told.settimeout(None)
            return answer
    return b""


_SERVERS = _Servers()
atexit.register(_SERVERS.close)
if hasattr(os, "register_at_fork"):  # a copy of this process has a server of its own
    os.register_at_fork(after_in_child=lambda: _SERVERS.__init__())  # type: ignore[misc]
