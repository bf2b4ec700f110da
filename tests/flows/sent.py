"""A stage of the tests that runs a function as a job."""

import time
from inspect import signature
from pathlib import Path

from prefect import flow

from tasks.artifact import Artifact
from tasks.deployed import FlowRuns
from tasks.keys import stage
from tasks.progress import JobProgress
from tasks.remote import RemoteExecutor
from tasks.where import Where
from tclora.config import ExecutionConfig
from tclora.jobs.call import EVENTS
from tclora.library.layout import Layout
from tclora.store.objects import Store
from tests.jobs import functions


def executor_of(store, folder, fleet=None, **settings):
    config = ExecutionConfig(backend="deployment", store=store, **settings)
    fleet = fleet or FlowRuns(config.deployment, config.lost_after)
    return RemoteExecutor(fleet, Store(store), config, Path(folder) / "scratch", 1, pause=0.5)


def takes_events(function):
    return EVENTS in signature(function).parameters


@stage("trial", "{name}")
def trial(name: str, arguments: dict, where: Where) -> Artifact:
    function = getattr(functions, name)
    told = {"on_event": where.progress.heard} if takes_events(function) else {}
    result = where.executor.run_isolated(function, **arguments, **told)
    return Artifact(root=where.layout.root, files={}, info={"result": result})


class Heard(JobProgress):
    """Passes events to the test."""

    def __init__(self, heard):
        super().__init__()
        self.heard = heard


def run_job(executor, function, heard=lambda _: None, /, **arguments):
    """Run a job as a stage does, in a flow."""

    @flow(validate_parameters=False, name="around")
    def around(where):
        return trial(function, arguments, where)

    where = Where(Layout(executor.scratch.parent), None, executor, Heard(heard))
    return around(where).info["result"]


def send_slow_job(store, folder):
    executor = executor_of(store, folder)
    return run_job(executor, "slow", target=Path(folder) / "target.txt", seconds=15)


def eventually(condition, seconds=60):
    """Wait until a condition holds; False if it does not in time (s)."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
