"""Attempts at jobs as flow runs of their own, on whichever worker of a work pool takes them.

A run that was killed and is started again also finds the flow run that is under way.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling, Crashed

from tasks.fleet import Ending, Fate, SentJob, Sign
from tasks.lost_runs import PATIENCE, LostRuns
from tclora.errors import ConfigError, StoreError
from tclora.jobs.records import JobRecords

R = TypeVar("R")
_PATIENCE = 600.0  # s without a Prefect server


@dataclass(frozen=True)
class FlowRuns:
    """Makes each attempt as a flow run of a deployment.

    Attributes
    ----------
    deployment : str
        Its flow and name.
    lost_after : float
        Silence (s) after which the worker of a job that was forgotten is taken for lost, if it
        keeps a slot from a job of ours.
    name : str
        What messages call it.
    """

    deployment: str
    lost_after: float
    name: str = "Prefect"
    _lost: LostRuns = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lost", LostRuns(self.lost_after))

    def check(self) -> None:
        """Check that the deployment is known to the server.

        Raises
        ------
        ConfigError
            If there is no such deployment.
        """
        with get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name(self.deployment)
            except ObjectNotFound:
                raise ConfigError(
                    f"execution.deployment must be known to the Prefect server {client.api_url}, "
                    f"got {self.deployment!r}; deploy it: prefect --no-prompt deploy --all "
                    "--prefect-file deployments/prefect.yaml, or name another server in "
                    "PREFECT_API_URL"
                ) from None

    @contextmanager
    def attempt(self, job: SentJob) -> Iterator["_Attempt"]:
        """Start a flow run for a job, or find the one that is under way."""
        with get_client(sync_client=True) as client:
            run = _patiently(lambda: self._flow_run(client, job))
            yield _Attempt(client, run, self._lost, job.records)

    def _flow_run(self, client: SyncPrefectClient, job: SentJob) -> FlowRun:
        tag = f"job-{job.records.key[:20]}"
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        former = client.read_flow_runs(flow_run_filter=wanted)
        for run in former:
            if run.state and not run.state.is_final() and not run.state.is_cancelling():
                get_run_logger().info("%s: goes on in flow run %s", job.name, run.name)
                return run
        made: Any = run_deployment(  # here, outside of an event loop, no coroutine
            self.deployment,
            parameters={"store": job.records.store.url, "key": job.records.key},
            flow_run_name=job.name,
            timeout=0,
            tags=[tag],
            # Two parents that look at the same time create one run.
            idempotency_key=f"{job.records.key}-{max((str(r.id) for r in former), default='')}",
        )
        found: FlowRun = made
        return found


class _Attempt:
    """A flow run."""

    def __init__(
        self, client: SyncPrefectClient, run: FlowRun, lost: LostRuns, records: JobRecords
    ) -> None:
        self._client = client
        self._run = run.id
        self._lost = lost
        self._records = records
        self.name = str(run.id)

    def look(self, heard: int) -> Ending | Sign:
        """Ask the server for the run's state."""
        run = _patiently(lambda: self._client.read_flow_run(self._run))
        state = run.state
        if state is None or state.is_final():
            return _ending(state)
        news = (state.type, state.timestamp)
        deployment = run.deployment_id
        if state.is_scheduled() and deployment:  # what it waits for may be lost
            _patiently(lambda: self._lost.end(self._client, deployment, self._records))
        return Sign(news, PATIENCE.get(state.type, float("inf")))

    def cancel(self) -> None:
        """Cancel the run."""
        with get_client(sync_client=True) as client:  # another thread's may be in use
            try:
                client.set_flow_run_state(self._run, Cancelling())
            except (httpx.HTTPError, ObjectNotFound) as error:  # it ends for another reason already
                message = "flow run %s could not be cancelled: %s"
                get_run_logger().warning(message, self._run, error)

    def give_up(self, message: str) -> None:
        """Say that the run has crashed, since nobody else can."""
        state: State = Crashed(message=message)
        _patiently(lambda: self._client.set_flow_run_state(self._run, state, force=True))


def _patiently(ask: Callable[[], R]) -> R:
    """Ask the Prefect server, also one that is being started again."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return ask()
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if status < 500 or time.monotonic() > end:
                raise
            time.sleep(2)


def _ending(state: State | None) -> Ending:
    if state is None or state.is_completed():
        return Ending(Fate.DONE)
    message = (state.message or "").rpartition("encountered an exception: ")[2]
    if state.is_cancelled():
        return Ending(Fate.CANCELLED, message)
    if state.is_crashed():
        return Ending(Fate.LOST, message)
    told = message.removeprefix("JobError: ").removeprefix(f"{StoreError.__name__}: ")
    return Ending(Fate.FAILED, told)
