"""The servers and workers of one machine: how each is started, and how to see that it is well."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tclora_cli import mlflow_server
from tclora_cli.prefect_api import is_online
from tclora_cli.processes import Health, Ledger
from tclora_cli.server import answers

RUNS, JOBS = POOLS = ("run-pool", "gpu-pool")  # runs wait for jobs, so each has its own
# s between a worker's looks at its pool: until then a slot that a job has left is idle.
_QUERY = {"PREFECT_WORKER_QUERY_SECONDS": "2"}


@dataclass(frozen=True)
class Machine:
    """What runs, and where its state is.

    Attributes
    ----------
    folder : Path
        Databases, logs, and what was started.
    root : Path
        Folder that runs read and write.
    jobs : int
        Jobs at once.
    prefect_port, mlflow_port : int
        Ports of 127.0.0.1.
    """

    folder: Path
    root: Path
    jobs: int
    prefect_port: int
    mlflow_port: int

    @classmethod
    def of(cls, folder: Path) -> "Machine | None":
        """Return the machine that a folder is of; None if none was started there."""
        settings = Ledger.read(folder / "machine.json").settings
        if not settings:
            return None
        ports = (int(settings[name]) for name in ("prefect_port", "mlflow_port"))
        return cls(folder, Path(settings["root"]), int(settings["jobs"]), *ports)

    @property
    def ledger(self) -> Path:
        """The file of what was started."""
        return self.folder / "machine.json"

    @property
    def prefect(self) -> str:
        """Address of the Prefect server."""
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        """Address of the MLflow server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What clients of the servers need to know."""
        return {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "MLFLOW_TRACKING_URI": self.mlflow,
            "TCLORA_ROOT": str(self.root),
        }

    def services(self, users: Mapping[str, str] | None = None) -> "list[Service]":
        """Return what runs, in the order of starting; see `logins.mlflow_settings` for users."""
        python = [sys.executable, "-m"]
        server = [*python, "prefect", "server", "start", "--host", "127.0.0.1", "--port"]
        own = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.folder / "mlartifacts"),
            **mlflow_server.SETTINGS,
        }
        leases = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"  # in memory, a restart ends all runs
        worker = [*python, "prefect", "worker", "start", "--type", "process", "--pool"]
        return [
            Service(
                "prefect",
                [*server, str(self.prefect_port)],
                {
                    "PREFECT_HOME": str(self.folder / "prefect"),
                    "PREFECT_UI_API_URL": f"{self.prefect}/api",
                    leases: "prefect.server.concurrency.lease_storage.filesystem",
                },
                partial(answers, f"{self.prefect}/api/health"),
                self.prefect_port,
            ),
            Service(
                "mlflow",
                mlflow_server.command(self.mlflow_port, login=bool(users)),
                _unless_set(own) | dict(users or {}),
                partial(answers, f"{self.mlflow}/health"),
                self.mlflow_port,
            ),
            *(
                Service(
                    f"worker of {pool}",
                    [*worker, pool, "--name", worker_name(pool)],
                    _unless_set(_QUERY) | self.environment,
                    partial(is_online, f"{self.prefect}/api", pool, worker_name(pool)),
                )
                for pool in POOLS
            ),
        ]


@dataclass(frozen=True)
class Service:
    """A process that serves: how it is started, and how to see that it is well."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    healthy: Health
    port: int | None = None


def worker_name(pool: str) -> str:
    """Return the name of this machine's worker of a pool, no other machine's at the same server."""
    return f"tclora-{pool}-{socket.gethostname()}"


def _unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """Return variables with the values that they have in this environment, else those given."""
    return {name: os.environ.get(name, value) for name, value in values.items()}
