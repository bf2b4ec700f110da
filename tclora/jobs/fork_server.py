"""A process that has imported what jobs need and forks one per job.

``python -m tclora.jobs.fork_server SOCKET`` serves whoever holds the other end of an inherited
socket, and ends when it is closed. `tclora.jobs.processes` is that other end.

It imports and forks, nothing else, so that it has a single thread and nothing that a copy could
not go on with: libraries start their threads when they compute.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from threadpoolctl import threadpool_limits

from tclora.imports import lasting
from tclora.jobs.devices import THREADS
from tclora.jobs.worker import main as run_job
from tclora.registry import load_plugins

_IDLE_SECONDS = 300.0
_REQUEST_BYTES = 1 << 16
_FILES = 4  # of a request: standard input, output and error, and where its process is told


@dataclass(frozen=True)
class Request:
    """A job to be forked.

    Attributes
    ----------
    spec : str
        File of its call.
    module : str
        Of its function.
    folder : str
        Working folder.
    environment : dict of str to str
        What differs from the server's.
    """

    spec: str
    module: str
    folder: str
    environment: dict[str, str]


class _Server:
    """Takes requests from a socket, and says on each one's how its process began and ended."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests: socket.socket | None = requests
        self._told: dict[int, socket.socket] = {}  # of the processes that run
        self._begun = time.time()
        self._ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which jobs get too
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)

    def serve(self) -> Request | None:
        """Return a request in the process forked for it, and nothing in the server at its end."""
        while (requests := self._requests) or self._told:
            sources = [self._ended, *([requests.fileno()] if requests else [])]
            ready, _, _ = select.select(sources, [], [], None if self._told else _IDLE_SECONDS)
            if not ready:
                return None
            if self._ended in ready:
                self._reap()
            if requests and requests.fileno() in ready and (request := self._receive(requests)):
                return request
        return None

    def _receive(self, requests: socket.socket) -> Request | None:
        message, files, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, _FILES)
        if not message:
            self._refuse()  # nobody will ask any more
            return None
        told = socket.socket(fileno=files.pop())
        request = Request(**json.loads(message))
        if changed_since(self._begun):  # another has to import it anew
            told.close()
            _close(files)
            self._refuse()
            return None
        with suppress(Exception), lasting():  # the job meets it again, and tells of it
            load_plugins()
            importlib.import_module(request.module)
        if pid := os.fork():
            self._told[pid] = told
            told.send(str(pid).encode())
            _close(files)
            return None
        self._leave()
        for target, file in enumerate(files):
            os.dup2(file, target)
        _close(files)
        told.close()
        return request

    def _refuse(self) -> None:
        """Take no more requests."""
        if self._requests:
            self._requests.close()
            self._requests = None

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._ended, 4096):
                pass
        for pid in list(self._told):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                with self._told.pop(pid) as told, suppress(OSError):  # whoever asked has gone
                    told.send(str(os.waitstatus_to_exitcode(status)).encode())

    def _leave(self) -> None:
        """Let go, in the copy, of what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for told in self._told.values():
            told.close()
        self._refuse()


def changed_since(then: float) -> bool:
    """Whether the source of a loaded module was changed since a time (s since 1970)."""
    for module in list(sys.modules.values()):
        if file := getattr(module, "__file__", None):
            with suppress(OSError):  # of an archive, or removed
                if Path(file).stat().st_mtime > then:
                    return True
    return False


def share_cores() -> None:
    """Let libraries that are loaded compute with as many threads as the environment says."""
    threads = int(os.environ[THREADS[0]])
    threadpool_limits(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def main(descriptor: int) -> None:
    """Serve until nobody asks any more; in a copy, do what was asked for."""
    with socket.socket(fileno=descriptor) as requests:
        request = _Server(requests).serve()
    if request:
        os.environ |= request.environment
        os.chdir(request.folder)
        if not sys.flags.safe_path:
            sys.path[0] = request.folder
        share_cores()
        run_job(request.spec)


if __name__ == "__main__":
    main(int(sys.argv[1]))
