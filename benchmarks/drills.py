"""Faults of every part of a fleet: each run must end with the library of an undisturbed one.

Servers, pools and workers are those of ``tclora up``, on this machine; jobs go through a store. A
drill starts a run of the deployed pipeline on a model of random weights, does harm while adapters
are trained (see `faults`), heals by ``tclora up`` as a user would, and starts the run again where
it has ended. Then the library is compared, file by file, with that of an undisturbed run whose jobs
were on the same worker, and no job may have been finished twice. Records are kept in a folder, so
that drills can be run one by one.
Usage: ``python benchmarks/drills.py [NAME ...] [--kills N] [--folder FOLDER]``.
"""

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml
from faults import VICTIMS, Fault, Ground, faults, killed
from fleet import FINAL, Fleet, contents, fleet, wait_for
from fleet_services import has_postgres, has_s3, postgres, s3_store, small_disk
from hosts import hosts, jobs_done, run_by_command
from mlflow import MlflowClient
from tables import report

CONFIGS = Path(__file__).parents[1] / "configs"
STARTS = 4  # times that a run is started at most
WHOLE = 50.0  # s of an undisturbed run, in which the moments of the kills lie
IDLE = 20.0  # s after which a run without a process is taken for lost
TWO_HOSTS, DEMO = "two-hosts", "two-hosts-demo"
ON_S3, ON_POSTGRES, ON_DISK = "s3", "postgres", "disk"
_PLACES = {
    "store-503": ON_S3, TWO_HOSTS: ON_S3, DEMO: ON_S3, "postgres-restarted": ON_POSTGRES,
    "disk-full": ON_DISK,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """How a drill has ended."""

    name: str
    library: str
    starts: int
    twice: int
    curves: str
    seconds: float
    note: str


def disturbed(ground: Ground, name: str, harm: Fault, *, training: bool = True) -> Record:
    """Run once with harm, heal, and start again where it must be.

    Parameters
    ----------
    ground : Ground
        What it runs on.
    name : str
        Of the drill; its library is another one every time, whatever an earlier drill has left.
    harm : callable
        Does the harm.
    training : bool
        Whether to wait until both jobs train.
    """
    site, begin, since = ground.fleet, time.monotonic(), time.time()
    made = f"{name}-{since:.0f}"
    run = site.send(made)
    if training:
        wait_for("two jobs that train", lambda: len(site.tree().get("job", ())) == 2)
        time.sleep(4)
    note = harm(ground, run)
    site.heal()
    starts = _completed(site, run)
    seconds = time.monotonic() - begin
    library = _compared(site.library("undisturbed"), site.library(made))
    return Record(
        name, library, starts, _finished_twice(site, since), _curves(site, made), seconds, note
    )


def two_hosts(ground: Ground, name: str) -> Record:
    """Run by `prefect deployment run` with jobs, measurements too, on two hosts.

    Compared with a run whose jobs are local, one after the other: with as many threads each, since
    some CPUs round otherwise with another number.
    """
    site, begin, since = ground.fleet, time.monotonic(), time.time()
    rows = {"data": {"path": "rows.jsonl", "test_fraction": 0.2}}
    changes: dict[str, Any] = _demo() if name == DEMO else rows
    changes["execution"] = {**site.settings["execution"], "jobs_per_host": 1}
    made = f"{name}-{since:.0f}"
    with hosts(site, 2) as homes:
        run_by_command(site, "tc-lora/demo", {**site.settings, **changes, "name": made})
    seconds = time.monotonic() - begin
    plain = f"{made}-plain"
    changes |= {"execution": {"backend": "local"}, "resources": {"jobs": 1}}
    site.finish(site.send(plain, **changes), limit=3600)
    library = _compared(site.library(plain), site.library(made))
    trained, twice = [jobs_done(home) for home in homes], _finished_twice(site, since)
    note = f"{trained[0]} jobs on one, {trained[1]} on the other, none on the run's own"
    return Record(name, library, 1, twice, _curves(site, made), seconds, note)


def _demo() -> dict[str, Any]:
    """Return the embedded demo's settings, for the same arithmetic on every host."""
    settings: dict[str, Any] = yaml.safe_load((CONFIGS / "demo.yaml").read_text(encoding="utf-8"))
    del settings["name"]
    train = {**settings["train"], "dtype": "float32"}
    return {**settings, "train": train, "resources": {"jobs": 2}, "route": {}}


def kill_at_random(
    ground: Ground, kills: int, done: Set[str], keep: Callable[[Record], None]
) -> None:
    """Disturb runs by a kill each until there are so many in all, those done among them."""
    for number in range(1, kills + 1):
        name = f"kill-{number}"
        if name in done:
            continue
        draw = random.Random(number)
        moment = draw.uniform(0, WHOLE)

        def harm(on: Ground, run: str, at: float = moment, by: random.Random = draw) -> str:
            return killed(on, at, by)

        keep(disturbed(ground, name, harm, training=False))


def _compared(wanted: Path, found: Path) -> str:
    first, second = contents(wanted), contents(found)
    names = sorted(first.keys() | second.keys())
    other = [name for name in names if first.get(name) != second.get(name)]
    return f"differs: {', '.join(other)}" if other else "equal"


def _completed(site: Fleet, run: str) -> int:
    """Wait until a run has ended well; start it again where it has not. Return the starts."""
    name = site.run(run)["name"]
    for start in range(1, STARTS + 1):
        state = _ended(site, run)
        if state == "COMPLETED":
            return start
        print(f"{name}: start {start} ended {state}: {site.run(run)['state']['message']}")
        run = site.send(name)
    raise RuntimeError(f"{name} must end well within {STARTS} starts, at last it was {state}")


def _ended(site: Fleet, run: str) -> str:
    """Return the final state of a run; what it is in if its process is lost."""
    seen = time.monotonic()

    def over() -> bool:
        nonlocal seen
        state = site.run(run)["state_type"]
        if state == "SCHEDULED" or any(_is_of(p, run) for p in site.tree().get("run", ())):
            seen = time.monotonic()
        return state in FINAL or time.monotonic() - seen > IDLE

    wait_for(f"the end of run {run}", over)
    return str(site.run(run)["state_type"])


def _is_of(process: psutil.Process, run: str) -> bool:
    with suppress(psutil.Error):
        return process.environ().get("PREFECT__FLOW_RUN_ID") == run
    return False


def _finished_twice(site: Fleet, since: float) -> int:
    """Count jobs that more than one flow run has finished."""
    done = [run for run in site.jobs(since) if run["state_type"] == "COMPLETED"]
    keys = Counter(tag for run in done for tag in run["tags"] if tag.startswith("job-"))
    return sum(count > 1 for count in keys.values())


def _curves(site: Fleet, name: str) -> str:
    """Say how many steps of each training MLflow has of the last run."""
    client = MlflowClient(site.machine.mlflow)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise RuntimeError(f"MLflow must have an experiment {name}")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    last = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags).info.run_id
    steps = [
        len({metric.step for metric in client.get_metric_history(run.info.run_id, "loss")})
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == last and "loss" in run.data.metrics
    ]
    return " + ".join(map(str, sorted(steps)))


def _needs(name: str) -> str:
    """Say what a drill lacks here; empty if nothing."""
    place = _PLACES.get(name)
    if place == ON_S3 and not has_s3():
        return "pip install s3fs moto[server]"
    if place == ON_POSTGRES and not has_postgres():
        return "install postgresql, and pip install psycopg[binary]"
    if place == ON_DISK and os.geteuid() != 0:
        return "run as root, who may mount a small disk"
    return ""


@contextmanager
def _ground(place: str | None, folder: Path) -> Iterator[Ground]:
    """Start what drills run on; all grounds of a folder have one folder of runs."""
    with ExitStack() as stack:
        proxy = database = None
        url = ""
        if place == ON_POSTGRES:
            database = stack.enter_context(postgres())
        if place == ON_S3:
            url, proxy = stack.enter_context(s3_store())
        if place == ON_DISK:
            url = f"file://{stack.enter_context(small_disk(folder / 'root' / 'disk'))}"
        site = stack.enter_context(fleet(folder, f"state-{place or 'plain'}"))
        if not site.library("undisturbed").exists():
            site.finish(site.send("undisturbed"))
        if url:
            execution = {**site.settings["execution"], "store": url}
            site = replace(site, settings={**site.settings, "execution": execution})
        yield Ground(site, proxy, database)


def _records(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of every drill."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def _show(file: Path, skipped: dict[str, str]) -> None:
    """Write the table of all records."""
    records = _records(file)
    kills = [record for name, record in records.items() if name.startswith("kill-")]
    good = sum(record["library"] == "equal" and not record["twice"] for record in kills)
    heads = {"name": "drill", "twice": "jobs done twice", "curves": "steps in MLflow"}
    note = (
        f"{good} of {len(kills)} runs with a SIGKILL of one process at a random moment end with "
        f"the digests of the undisturbed run. Drawn from: {', '.join(VICTIMS)}. Not: the store, "
        "a folder in those runs, and the drill itself. After each fault `tclora up` heals; starts: "
        "how often the run was started. Libraries are compared by the digests of all files of the "
        "manifest, records of trainings without their times and memory."
    )
    note += "".join(f" Skipped: {name} ({need})." for name, need in skipped.items())
    frame = pd.DataFrame(records.values()).rename(columns=heads)
    report("drills", "Faults of every part of a fleet", frame, note)


def main() -> None:
    """Run drills, keep their records and show all of them."""
    names = [*faults, TWO_HOSTS, DEMO]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--kills", type=int, default=0, help="random kills, those done counted")
    parser.add_argument("--folder", type=Path, default=Path("runs/drills"), help="of the records")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"NAME must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    wanted = given.names or ([] if given.kills else names)
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "records.jsonl"

    def keep(record: Record) -> None:
        print(record, flush=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")

    skipped = {name: need for name in wanted if (need := _needs(name))}
    for place in (None, ON_S3, ON_POSTGRES, ON_DISK):
        here = [n for n in wanted if n not in skipped and _PLACES.get(n) == place]
        kills = given.kills if place is None else 0
        if not here and not kills:
            continue
        with _ground(place, folder) as ground:
            for name in here:
                two = name in (TWO_HOSTS, DEMO)
                keep(two_hosts(ground, name) if two else disturbed(ground, name, faults[name]))
            kill_at_random(ground, kills, _records(file).keys(), keep)
    _show(file, skipped)


if __name__ == "__main__":
    main()
