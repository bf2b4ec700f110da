"""A process that has imported what jobs need and forks one per job.

``python -m tclora.jobs.fork_server SOCKET`` serves its caller, who holds the other end of an
inherited socket (`tclora.jobs.processes`), and ends when that is closed.

It imports modules of this package and forks, nothing else, so that it has a single thread and
nothing that a copy could not go on with: libraries start their threads when they compute. Plugins,
whose imports may do anything, are left to the jobs.
"""

import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tclora.imports import lasting
from tclora.jobs.worker import main as run_job

_PACKAGE = "tclora"
_IDLE_SECONDS = 300.0
_REQUEST_BYTES = 1 << 16
_FILES = 4  # of a request: standard input, output and error, and where the caller is told


@dataclass(frozen=True)
class Request:
    """A job to be forked.

    Attributes
    ----------
    spec : str
        File of its call.
    module : str
        Of its function.
    environment : dict of str to str
        What differs from the server's.
    """

    spec: str
    module: str
    environment: dict[str, str]


class _Forks:
    """Takes requests, and tells on each one's socket how its job began and ended.

    The first message is the job's process id, with a descriptor of the process, the second its exit
    code. A socket that is closed without one is that of a request which was refused.
    """

    def __init__(self, requests: socket.socket) -> None:
        self._requests: socket.socket | None = requests
        self._told: dict[int, socket.socket] = {}  # by the jobs that run
        self._sources: dict[str, tuple[int, ...]] = {}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        self._interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # jobs get a terminal's too
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake[1])
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._wake[0], selectors.EVENT_READ)
        self._ready.register(requests, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Return a request in the process forked for it, and nothing in the server at its end."""
        while self._requests or self._told:
            ready = {key.fd for key, _ in self._ready.select(None if self._told else _IDLE_SECONDS)}
            if not ready:
                return None
            if self._wake[0] in ready:
                self._reap()
            if self._requests and ready - {self._wake[0]}:
                request = self._receive(self._requests)
                if request:
                    return request
        return None

    def _receive(self, requests: socket.socket) -> Request | None:
        message, files, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, _FILES)
        if not message:
            self._refuse()  # nobody will ask any more
            return None
        try:
            if len(files) < _FILES:  # more are open than may be
                return None
            request = Request(**json.loads(message))
            if self._prepared(request.module):
                return self._forked(request, files)
            self._refuse()
            return None
        finally:
            _close(files)

    def _prepared(self, module: str) -> bool:
        """Import a module of this package; say whether a copy would be as good as a new process."""
        if any(_state(file) != state for file, state in self._sources.items()):
            return False
        if module.partition(".")[0] != _PACKAGE:
            return True
        try:
            with lasting():
                importlib.import_module(module)
        except Exception:  # a new process meets it too, and tells of it
            return False
        for name, loaded in list(sys.modules.items()):
            file = getattr(loaded, "__file__", None)
            if file and name.partition(".")[0] == _PACKAGE:
                self._sources.setdefault(file, _state(file))
        return threading.active_count() == 1

    def _forked(self, request: Request, files: list[int]) -> Request | None:
        told = socket.socket(fileno=files.pop())
        try:
            pid = os.fork()
        except OSError:  # there are too many; a new process fails likewise, and tells of it
            told.close()
            return None
        if not pid:
            told.close()
            self._leave()
            for target, file in enumerate(files):
                os.dup2(file, target)
            return request
        self._told[pid] = told
        try:
            descriptor = os.pidfd_open(pid)
            socket.send_fds(told, [str(pid).encode()], [descriptor])
            os.close(descriptor)
        except OSError:  # the caller has given up, or the kernel has no such descriptors
            told.close()
            os.kill(pid, signal.SIGKILL)
        return None

    def _refuse(self) -> None:
        """Take no more requests."""
        if self._requests:
            self._ready.unregister(self._requests)
            self._requests.close()
            self._requests = None

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._wake[0], 4096):
                pass
        for pid in list(self._told):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                with self._told.pop(pid) as told, suppress(OSError):  # the caller has gone
                    told.send(str(os.waitstatus_to_exitcode(status)).encode())

    def _leave(self) -> None:
        """Let go, in a copy, of what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._ready.close()
        _close(self._wake)
        for told in self._told.values():
            told.close()
        if self._requests:
            self._requests.close()
        if numpy := sys.modules.get("numpy"):  # Python's own generator does so by itself
            numpy.random.seed()


def _state(file: str) -> tuple[int, ...]:
    """Return what changes with a file: nothing is equal to that of one that is gone."""
    with suppress(OSError):
        found = Path(file).stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
    return ()


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def main(descriptor: int) -> None:
    """Serve until nobody asks any more; in a copy, do what was asked for."""
    with socket.socket(fileno=descriptor) as requests:
        request = _Forks(requests).serve()
    if request:
        os.environ |= request.environment
        run_job(request.spec)


if __name__ == "__main__":
    main(int(sys.argv[1]))
