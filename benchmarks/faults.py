"""The faults of the drills: what each does to a fleet while a run trains its adapters."""

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fleet import FINAL, Fleet, wait_for
from fleet_services import Postgres, Proxy

from tclora.library.places import staging_area
from tclora_cli.services import JOBS, RUNS

# What may be killed at random. Not: the drill itself, and the store, a folder in these runs.
VICTIMS = (
    "prefect", "mlflow", "server of mlflow", f"worker of {RUNS}", f"worker of {JOBS}", "run",
    "flow run of a job", "fork server", "job",
)  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """What drills run on: a fleet, and what some have beside it."""

    fleet: Fleet
    proxy: Proxy | None = None
    database: Postgres | None = None


Fault = Callable[[Ground, str], str]  # of a ground, while a run of this id trains; returns a note
faults: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """Register a fault by its function's name."""
    faults[function.__name__.replace("_", "-")] = function
    return function


@fault
def nothing(ground: Ground, run: str) -> str:
    """Do no harm, for comparison."""
    return "for comparison"


@fault
def worker_killed(ground: Ground, run: str) -> str:
    """Kill the jobs' worker alone: its flow runs go on without it."""
    ground.fleet.kill(f"worker of {JOBS}")
    return "the worker's process alone"


@fault
def worker_machine_lost(ground: Ground, run: str) -> str:
    """Kill the jobs' worker with all that it has started, as if its machine were gone."""
    ground.fleet.kill(f"worker of {JOBS}", with_children=True)
    return "worker, flow runs and jobs at once"


@fault
def parent_killed(ground: Ground, run: str) -> str:
    """Kill the run while its jobs go on."""
    ground.fleet.tree()["run"][0].kill()
    return "its jobs went on"


@fault
def run_machine_lost(ground: Ground, run: str) -> str:
    """Kill the run and remove the folder it works in, as if its machine were gone."""
    ground.fleet.tree()["run"][0].kill()
    shutil.rmtree(staging_area(ground.fleet.library(ground.fleet.run(run)["name"])))
    return "its folder was removed; its jobs went on"


@fault
def prefect_restarted(ground: Ground, run: str) -> str:
    """Kill the Prefect server and start it again."""
    return f"away for {_away(ground, 'prefect', 5):.0f} s"


@fault
def mlflow_down(ground: Ground, run: str) -> str:
    """Kill the MLflow server and start it again a minute later."""
    return f"away for {_away(ground, 'mlflow', 60):.0f} s"


@fault
def store_503(ground: Ground, run: str) -> str:
    """Let the store answer every request with 503 for half a minute."""
    if ground.proxy is None:
        raise RuntimeError("store-503 must have a proxy before the store")
    with ground.proxy.refusing():
        time.sleep(30)
    return f"{ground.proxy.refused} requests refused in 30 s"


@fault
def postgres_restarted(ground: Ground, run: str) -> str:
    """Stop PostgreSQL under both servers at once, and start it again."""
    if ground.database is None:
        raise RuntimeError("postgres-restarted must have a database")
    ground.database.stop("immediate")
    time.sleep(5)
    ground.database.start()
    return "below Prefect and MLflow, away for 5 s"


@fault
def disk_full(ground: Ground, run: str) -> str:
    """Leave the disk of the store no room until the run has ended."""
    filler = Path(ground.fleet.settings["execution"]["store"].removeprefix("file://")) / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    wait_for("the end of the run", lambda: ground.fleet.run(run)["state_type"] in FINAL)
    message = str(ground.fleet.run(run)["state"]["message"])
    filler.unlink()
    said = message.splitlines()[-1].partition(": '/")[0].strip(" -")
    return f"the run said: {said}, and where"


@fault
def started_twice(ground: Ground, run: str) -> str:
    """Start the same run a second time while the first one works."""
    second = ground.fleet.send(ground.fleet.run(run)["name"])
    ground.fleet.finish(run)
    ground.fleet.finish(second)
    return "both ended well"


@fault
def cancelled(ground: Ground, run: str) -> str:
    """Cancel the run in Prefect; its jobs must end with it."""
    jobs = ground.fleet.tree()["job"]
    ground.fleet.ask("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    ground.fleet.finish(run, "CANCELLED")
    wait_for("the end of its jobs", lambda: not any(job.is_running() for job in jobs))
    return "its jobs ended too"


def killed(ground: Ground, moment: float, draw: random.Random) -> str:
    """Kill any one process of the tree, so many seconds from now."""
    time.sleep(moment)
    tree = ground.fleet.tree()
    found = [(kind, process) for kind in VICTIMS for process in tree.get(kind, ())]
    kind, process = draw.choice(found)
    process.kill()
    return f"{kind}, {moment:.0f} s after the start"


def _away(ground: Ground, name: str, seconds: float) -> float:
    begin = time.monotonic()
    ground.fleet.kill(name, with_children=True)
    time.sleep(seconds)
    ground.fleet.heal()
    return time.monotonic() - begin
