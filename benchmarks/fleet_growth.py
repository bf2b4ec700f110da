"""Many jobs on many worker slots: how busy the slots are, and what a job costs those who send it.

Jobs sleep and write a file; everything else is real: flow runs of a deployment and a process
worker, or a Dask scheduler and a worker per slot; a store, files by their digests, and the executor
of `execution.backend`. A flow run has processes of its own that import Prefect, some eight seconds
of a core, a Dask task only the job's: let jobs sleep so long that the cores of this machine are not
what is measured (slots x those seconds / cores, and some more).
Usage: ``python benchmarks/fleet_growth.py [--backend deployment|dask] [--jobs 500] [--slots 16]
[--seconds 120]``.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import psutil
from fleet import Fleet, fleet
from tables import report

if TYPE_CHECKING:
    from tasks.fleet import Fleet as FleetOfJobs
    from tclora.config import ExecutionConfig

_BETWEEN = 2.0  # s between two looks at memory
_IDLE = 30.0  # s for which the servers are watched before anything is sent


@dataclass
class Sampled:
    """What a block has taken.

    Attributes
    ----------
    seconds : float
        Its time.
    memory : list of float
        Resident memory of the parent (MB) in the course of time.
    parent, server : float
        Processor time (s) of both.
    idle : float
        Processor time of the server in a second in which nothing is sent (s).
    """

    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)
    parent: float = 0.0
    server: float = 0.0
    idle: float = 0.0


@contextmanager
def sampled(site: Fleet) -> Iterator[Sampled]:
    """Look at this process and at the Prefect server for the duration of a block."""
    own, server = psutil.Process(), site.started("prefect").process
    if server is None:
        raise RuntimeError("the Prefect server must run")
    resting = _seconds(server)
    time.sleep(_IDLE)
    before = _seconds(own), _seconds(server)
    found, over = Sampled(idle=(before[1] - resting) / _IDLE), threading.Event()
    begin = time.monotonic()

    def look() -> None:
        while not over.wait(_BETWEEN):
            found.memory.append(own.memory_info().rss / 1e6)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.seconds = time.monotonic() - begin
        found.parent = _seconds(own) - before[0]
        found.server = _seconds(server) - before[1]


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def send(site: Fleet, folder: Path, given: argparse.Namespace) -> tuple[pd.DataFrame, Sampled]:
    """Run the jobs as a run does; return when each began and ended, and what that has taken."""
    from simulated_stage import simulate  # imports Prefect, which reads the environment

    from flows.context import Context
    from flows.parallel import collect, parallel_flow
    from tasks.executing import SLOTS
    from tasks.progress import JobProgress
    from tasks.remote import RemoteExecutor
    from tasks.where import Where
    from tclora.config import ExecutionConfig
    from tclora.library.layout import Layout
    from tclora.store.objects import Store

    config = ExecutionConfig(
        **site.settings["execution"]
        | {"backend": given.backend, "lost_after": 600, "jobs_per_host": given.slots}
    )
    if config.store is None:
        raise RuntimeError("the fleet's jobs must have a store")

    @parallel_flow("growth")
    def growth(context: Context) -> list[dict[str, float]]:
        names = [f"job-{number:03d}" for number in range(given.jobs)]
        futures = {
            name: simulate.submit(name, given.seconds, given.megabytes, context.where)
            for name in names
        }
        return [dict(part.info) for part in collect("simulate", futures, context).values()]

    with _fleet(config, given.slots) as fleet_of_jobs:
        store, scratch = Store(config.store), folder / "scratch"
        executor = RemoteExecutor(fleet_of_jobs, store, config, scratch, SLOTS)
        where = Where(Layout(folder / "library"), None, executor, JobProgress())
        with sampled(site) as found:
            done = pd.DataFrame(growth(Context(None, None, where)))
        return done, found


@contextmanager
def _fleet(config: "ExecutionConfig", slots: int) -> "Iterator[FleetOfJobs]":
    from tasks.dask_tasks import dask_tasks
    from tasks.deployed import FlowRuns

    if config.backend == "dask":
        with dask_tasks(None, "auto", slots) as tasks:
            yield tasks
    else:
        yield FlowRuns(config.deployment, config.lost_after)


def main() -> None:
    """Send the jobs, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("deployment", "dask"), default="deployment")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--slots", type=int, default=16, help="jobs at once")
    parser.add_argument("--seconds", type=float, default=120, help="that a job sleeps")
    parser.add_argument("--megabytes", type=int, default=50, help="that a job writes")
    given = parser.parse_args()
    here = Path(__file__).parent
    os.environ |= {
        "TCLORA_PLUGINS": "simulated",
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with tempfile.TemporaryDirectory() as scratch, fleet(Path(scratch), jobs=given.slots) as site:
        os.environ |= site.machine.environment
        done, found = send(site, Path(scratch), given)
    busy = (done["end"] - done["begin"]).sum()
    span = done["end"].max() - done["begin"].min()
    tenth = max(1, len(found.memory) // 10)
    row = {
        "backend": given.backend,
        "jobs": given.jobs,
        "slots": given.slots,
        "seconds each": given.seconds,
        "MB each": given.megabytes,
        "whole (s)": found.seconds,
        "utilisation (%)": 100 * busy / (given.slots * span),
        "idle slot per job (s)": (given.slots * span - busy) / given.jobs,
        "parent, processor per job (s)": found.parent / given.jobs,
        "server, processor per job (s)": found.server / given.jobs,
        "of it what it takes when idle (s)": found.idle * found.seconds / given.jobs,
        "parent's memory, first tenth (MB)": sum(found.memory[:tenth]) / tenth,
        "last tenth (MB)": sum(found.memory[-tenth:]) / tenth,
    }
    report(
        f"fleet_growth_{given.backend}",
        "Many jobs on many worker slots",
        pd.DataFrame([row]),
        "Utilisation: time inside of jobs' functions over slots times the time from the first "
        "function's begin to the last one's end. Processor time of the run while it sends jobs and "
        "takes in what they made, without the start of a cluster of its own, and of the server, "
        f"watched before for {_IDLE:.0f} s of rest. All on one machine of {os.cpu_count()} cores, "
        "which also run servers, workers and the jobs' processes.",
    )


if __name__ == "__main__":
    main()
