"""A Prefect server for one run, where the user has none: a child that cannot outlive the run.

Prefect would start one of its own with the first client; it survives a killed run. Ours has the
same database and the same settings, and watches its parent (see `tclora_cli.server_process`).
"""

import atexit
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from tclora.errors import JobError

TIMEOUT = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
_DEFAULT_TIMEOUT = 120.0  # s; migrating a new database takes most of it
_STOP_TIMEOUT = 5.0  # s
# As Prefect's own temporary server runs; without a UI there is nothing to link to.
_SERVER = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
_CLIENT = {"PREFECT_UI_URL": ""}


class TemporaryServer:
    """A child that imports the server at once and serves when told to; it ends with this process.

    Where PREFECT_API_URL or Prefect's active profile names a server, nothing is served. To be made
    before Prefect is imported here: what Prefect sends at exit must find the server still there.
    """

    def __init__(self) -> None:
        self._url: str | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tclora_cli.server_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _SERVER,
            start_new_session=True,  # an interrupted run still reports its end to the server
        )
        atexit.register(self.stop)

    def start(self) -> None:
        """Let it serve, and point this process and its children at it, before they import Prefect.

        Raises
        ------
        JobError
            If the process has ended.
        """
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            raise JobError(f"the Prefect server must start, but {self._ending()}")
        port = json.loads(line)["port"]
        if port is None:  # the user's settings name a server
            return
        self._url = f"http://127.0.0.1:{port}/api"
        os.environ |= {"PREFECT_API_URL": self._url} | _CLIENT
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write("serve\n")
        stdin.flush()

    def wait(self) -> None:
        """Wait until it answers, at most $PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS (s).

        Raises
        ------
        JobError
            If it ends or does not answer in time.
        """
        limit = float(os.environ.get(TIMEOUT) or _DEFAULT_TIMEOUT)
        end = time.monotonic() + limit
        while self._url and not answers(f"{self._url}/health"):
            if self._process.poll() is not None:
                raise JobError(f"the Prefect server must start, but {self._ending()}")
            if time.monotonic() > end:
                raise JobError(
                    f"the Prefect server must answer within {limit:g} s; raise {TIMEOUT}, or name "
                    "a server of yours in PREFECT_API_URL"
                )
            time.sleep(0.1)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Wait as `wait` does; flows of the block send this server no heartbeats.

        They tell a server that outlives a run of the run's death; at every flow's end Prefect waits
        for the thread that sends them, up to a second. A server of the user's gets them.
        """
        self.wait()
        if not self._url:
            yield
            return
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.communicate()

    def _ending(self) -> str:
        return f"it ended with code {self._process.wait()}; its reason is above"


def answers(url: str) -> bool:
    """Return whether an address answers that all is well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False
