"""A small fleet on the loopback for measurements: servers, pools, workers, a store, and their harm.

Servers, pools and workers are those of ``tclora up``, so that healing is what a user would do: the
same command again. The model is a Llama of random weights: what it learns matters to nobody, and
every run is short enough to be repeated many times.
"""

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from kills import small_base  # a script's neighbour

from tclora.files import sha256_file
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora_cli import machine as machines
from tclora_cli.processes import Ledger, Started
from tclora_cli.services import Machine

Run = dict[str, Any]  # a flow run as Prefect's API describes it
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
WAIT = 300.0  # s that anything here may take
# What differs between the records of two equal trainings.
_TIMES = {"seconds", "tokens_per_s", "memory"}


@dataclass(frozen=True)
class Fleet:
    """Servers and workers in a folder, and the runs that are sent to them.

    Attributes
    ----------
    machine : Machine
        Its servers, pools and workers.
    settings : dict
        Configuration that all runs have in common.
    """

    machine: Machine
    settings: dict[str, Any]
    _sent: set[str] = field(default_factory=set)

    def heal(self) -> None:
        """Start whatever does not run, as a user would."""
        machines.up(self.machine, lambda _: None)

    def started(self, name: str) -> Started:
        """Return what was started under a name, such as "prefect"."""
        return Ledger.read(self.machine.ledger).started[name]

    def kill(self, name: str, *, with_children: bool = False) -> None:
        """Kill a server or a worker as the system would: alone, or with all it has started."""
        process = self.started(name).process
        if process is None:
            raise RuntimeError(f"{name} must run to be killed")
        family = [process, *(process.children(recursive=True) if with_children else [])]
        for part in family:
            part.kill()
        psutil.wait_procs(family, timeout=WAIT)

    def send(self, name: str, **changes: Any) -> str:  # noqa: ANN401
        """Start a run of the deployed pipeline; return the flow run's id.

        Parameters
        ----------
        name : str
            Of the library.
        **changes
            Sections or values in place of the common settings.
        """
        deployment = self.ask("GET", "deployments/name/tc-lora/demo")["id"]
        config = {**self.settings, "name": name, **changes}
        body = {"parameters": {"config": config}, "name": name, "state": {"type": "SCHEDULED"}}
        run = str(self.ask("POST", f"deployments/{deployment}/create_flow_run", body)["id"])
        self._sent.add(run)
        return run

    def finish(self, run: str, wanted: str = "COMPLETED", limit: float = WAIT) -> None:
        """Wait for the end of a run, so long (s) at most.

        Raises
        ------
        RuntimeError
            If it ends in another state.
        """
        wait_for(f"the end of run {run}", lambda: self.run(run)["state_type"] in FINAL, limit)
        state = self.run(run)["state"]
        if state["type"] != wanted:
            raise RuntimeError(f"run {run} must end {wanted}, but: {state}")

    def run(self, run: str) -> Run:
        """Return a flow run."""
        found: Run = self.ask("GET", f"flow_runs/{run}")
        return found

    def jobs(self, since: float = 0.0) -> list[Run]:
        """Return the flow runs of jobs that were created after a time (s since 1970)."""
        deployment = self.ask("GET", "deployments/name/job/job")["id"]
        body: dict[str, Any] = {"deployments": {"id": {"any_": [deployment]}}, "limit": 200}
        found: list[Run] = self.ask("POST", "flow_runs/filter", body)
        return [run for run in found if _seconds(run["created"]) > since]

    def ask(self, method: str, path: str, body: Any = None) -> Any:  # noqa: ANN401
        """Ask the Prefect server, also while it is started again."""
        end = time.monotonic() + WAIT
        while True:
            try:
                url = f"{self.machine.prefect}/api/{path}"
                answer = httpx.request(method, url, json=body, timeout=30)
                if answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                    return answer.raise_for_status().json() if answer.content else None
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def library(self, name: str) -> Path:
        """Return where a run leaves its library."""
        return self.machine.root / "runs" / name

    def _kind(self, process: psutil.Process) -> str:
        command = " ".join(process.cmdline())
        if Path(f"/proc/{process.pid}/fd/2").readlink().parent.name.startswith("tclora-job-"):
            return "job" if "tclora.jobs" in command else "helper"
        if "tclora.jobs.fork_server" in command:
            return "fork server"
        if run := process.environ().get("PREFECT__FLOW_RUN_ID"):
            return "run" if run in self._sent else "flow run of a job"
        return "server of mlflow" if "uvicorn" in command else "helper"

    def tree(self) -> dict[str, list[psutil.Process]]:
        """Return the processes of the fleet by what they are, also orphans."""
        names = {s.pid: name for name, s in Ledger.read(self.machine.ledger).started.items()}
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("TCLORA_CACHE") == os.environ["TCLORA_CACHE"]:
                    kind = names.get(process.pid) or self._kind(process)
                    found.setdefault(kind, []).append(process)
            except (psutil.Error, OSError):  # it has ended, or is not ours
                continue
        return found


@contextmanager
def fleet(folder: Path, state: str = "state", jobs: int = 2) -> Iterator[Fleet]:
    """Start a fleet; it ends with the block, and what it has made stays.

    Parameters
    ----------
    folder : Path
        Of everything it writes, runs in `root` among them.
    state : str
        Folder in it of the servers' databases.
    jobs : int
        Jobs at once.

    Notes
    -----
    Sets this process's environment to what the servers and workers need.
    """
    root = folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "rows.jsonl").exists():
        small_base(root / "model")
        _write_rows(root / "rows.jsonl")
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "TCLORA_CACHE": str(folder / "cache"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    machine = Machine(folder / state, root, jobs, free_port(), free_port())
    made = Fleet(machine, _smallest(folder))
    try:
        made.heal()
        yield made
    finally:
        machines.down(machine, lambda _: None)


def _smallest(folder: Path) -> dict[str, Any]:
    """Two clusters, two trainings of some seconds, one merge; nothing is held out or measured."""
    return {
        "base_model": "model",
        "data": {"path": "rows.jsonl", "test_fraction": 0},
        "cluster": {"k": 2, "min_rows": 4},
        "train": {
            "r": 2, "batch_size": 8, "max_steps": 150, "epochs": 199, "template": "plain",
            "dtype": "float32", "joint": False, "checkpoint_steps": 10,
        },
        "factorise": {"rank": 2, "ranks": [1, 2], "n_starts": 1, "n_iter": 20},
        "merge": {"methods": ["tc-lora"], "refit_steps": 0, "sample_rows": 2},
        "route": {"enabled": False},
        "execution": {
            "backend": "deployment", "store": f"file://{folder}/root/store", "jobs_per_host": 2,
            "lost_after": 30,
        },
    }  # fmt: skip


def _write_rows(file: Path) -> None:
    draw = random.Random(0)
    words = ("apple", "river", "stone", "cloud", "green", "seven", "house", "music")
    rows = []
    for _ in range(28):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        rows.append({"prompt": f"Add the two numbers {a} and {b}.", "response": str(a + b)})
        some = draw.sample(words, 3)
        listing = ", ".join(some)
        rows.append(
            {"prompt": f"Write this list of words in reverse order: {listing}",
             "response": ", ".join(reversed(some))}
        )  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def contents(library: Path) -> dict[str, str]:
    """Return what a library is, file by file: its digest; of a training its losses, not its times.

    Raises
    ------
    LibraryError
        If it is not whole.
    """
    found, logs = {}, Layout(library).training("").parent
    for name, digest in read_manifest(library).digests.items():
        file = library / name
        if file.is_relative_to(logs):
            records = json.loads(file.read_text(encoding="utf-8"))
            kept = [{k: v for k, v in r.items() if k not in _TIMES} for r in records]
            found[name] = json.dumps(kept)
        elif sha256_file(file) != digest:
            raise RuntimeError(f"{file} must have the digest of the manifest")
        else:
            found[name] = digest
    return found


def wait_for(what: str, done: Callable[[], Any], limit: float = WAIT) -> Any:  # noqa: ANN401
    """Wait until something is true, and return it.

    Raises
    ------
    TimeoutError
        If it is not within the time (s).
    """
    end = time.monotonic() + limit
    while not (found := done()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} must come within {limit:.0f} s, but did not")
        time.sleep(0.1)
    return found


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
