"""Jobs as flow runs of their own: sent to a Prefect deployment, followed, found again.

Files travel through a store (`tclora.jobs.parcel`). What a job is, is its key: a run that was
killed and is started again finds the flow run that is under way, or what it has delivered.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling, Crashed

from tasks.keys import current_key, job_source
from tclora.config import ExecutionConfig
from tclora.errors import ConfigError, JobError, StoreError
from tclora.files import sha256_json
from tclora.jobs.call import EVENTS, Call, EventCallback, result_type
from tclora.jobs.parcel import Delivery, Packed
from tclora.jobs.records import JobRecords
from tclora.jobs.remote import accept
from tclora.jobs.run import job_name
from tclora.store.objects import Store

P = ParamSpec("P")
R = TypeVar("R")
SLOTS = 32  # jobs that are sent at once; the work pool's limit says how many of them run
_PATIENCE = 600.0  # s without a Prefect server
_START = 3  # times lost_after that a worker may take to start a job: images are pulled meanwhile


@dataclass
class _Sent:
    """The jobs of an executor: flow runs under way, keys of all, and whether it was stopped."""

    running: set[UUID] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class DeploymentExecutor:
    """Runs each job as a flow run of a deployment, on whichever worker takes it.

    Attributes
    ----------
    config : ExecutionConfig
        Which deployment and store, and what is done about lost workers.
    scratch : Path
        Folder whose files stay where a job runs.
    slots : int
        Jobs that are sent at once.
    timeout : float or None
        A job is ended after this time (s).
    pause : float
        Time between two looks at a job (s).
    """

    config: ExecutionConfig
    scratch: Path
    slots: int = SLOTS
    timeout: float | None = None
    pause: float = 2.0
    _sent: _Sent = field(default_factory=_Sent, repr=False)

    @property
    def store(self) -> Store:
        """The store of the configuration."""
        return Store(str(self.config.store))

    def check(self) -> None:
        """Check that the deployment is known to the server, and that the store can be used.

        Raises
        ------
        ConfigError
            If there is no such deployment.
        StoreError
            If the store cannot be written.
        """
        name = self.config.deployment
        with get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name(name)
            except ObjectNotFound:
                raise ConfigError(
                    f"execution.deployment must be known to the Prefect server {client.api_url}, "
                    f"got {name!r}; deploy it: prefect --no-prompt deploy --all --prefect-file "
                    "deployments/prefect.yaml, or name another server in PREFECT_API_URL"
                ) from None
        self.store.check()

    def shared_by(self, jobs: int) -> "DeploymentExecutor":
        """Return this executor: what a job has of its worker is not for the sender to say."""
        return self

    def run_isolated(self, function: Callable[P, R], /, *args: P.args, **arguments: P.kwargs) -> R:
        """Run a function as a flow run of its own; see `tclora.jobs.run.LocalExecutor`.

        Raises
        ------
        JobError
            If the function raises a domain error, its flow run is cancelled, or worker after
            worker is lost.
        StoreError
            If the store cannot be used.
        """
        if args:
            raise TypeError(f"arguments of {function.__name__} must be given by keyword")
        on_event: Any = arguments.get(EVENTS)
        packed, store = Packed.of(function, arguments), self.store
        paths = [str(path) for path in packed.paths]
        key = sha256_json([current_key(), packed.function, packed.arguments, paths])
        job = _Job(job_name(function.__name__, arguments), JobRecords(store, key), on_event)
        self._sent.keys.add(key)
        delivery = job.records.delivery()
        if delivery is None:
            source = job_source(Call(function=packed.function, arguments=packed.arguments))
            beside, limit = self.config.jobs_per_host, self.timeout
            parcel = packed.sent(store, self.scratch, source=source, beside=beside, timeout=limit)
            job.records.send(parcel)
            delivery = self._made(job)
        else:
            get_run_logger().info("%s: was finished after the run that sent it had ended", job.name)
        job.listen(delivery.attempt)
        accept(delivery, job.records, packed.places)
        result: R = result_type(function).validate_python(delivery.unpacked(packed.places))
        return result

    def stop(self) -> None:
        """Cancel all flow runs that are under way and send nothing more."""
        self._sent.stopped.set()
        with get_client(sync_client=True) as client:
            for run in list(self._sent.running):
                _cancel(client, run)

    def forget(self) -> None:
        """Remove the records of all jobs: what they made is in the run's own hands now."""
        store = self.store
        for key in self._sent.keys:
            JobRecords(store, key).forget()

    def _made(self, job: "_Job") -> Delivery:
        """Send a job until a worker lives long enough to do it."""
        with get_client(sync_client=True) as client:
            for attempt in range(self.config.retries + 1):
                if attempt:
                    time.sleep(min(60, self.pause * 2**attempt))
                run = _patiently(lambda: self._flow_run(client, job))
                state = self._followed(client, run, job)
                delivery = job.records.delivery()
                if delivery is not None:
                    return delivery
                if state is None or state.type != StateType.CRASHED:
                    break
                get_run_logger().warning("%s: lost its worker: %s", job.name, state.message)
        raise JobError(_ending(job.name, state, self.config.retries))

    def _flow_run(self, client: SyncPrefectClient, job: "_Job") -> FlowRun:
        """Return the flow run of a job that is under way, or a new one."""
        if self._sent.stopped.is_set():
            raise JobError(f"job {job.name} was not started: the run was interrupted")
        tag = f"job-{job.records.key[:20]}"
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        former = client.read_flow_runs(flow_run_filter=wanted)
        for run in former:
            if run.state and not run.state.is_final() and not run.state.is_cancelling():
                get_run_logger().info("%s: goes on in flow run %s", job.name, run.name)
                return run
        made: Any = run_deployment(  # here, outside of an event loop, no coroutine
            self.config.deployment,
            parameters={"store": job.records.store.url, "key": job.records.key},
            flow_run_name=job.name,
            timeout=0,
            tags=[tag],
            # Two parents that look at the same time create one run.
            idempotency_key=f"{job.records.key}-{len(former)}",
        )
        found: FlowRun = made
        return found

    def _followed(self, client: SyncPrefectClient, run: FlowRun, job: "_Job") -> State | None:
        """Wait for the end of a flow run; whatever else ends the wait cancels it."""
        self._sent.running.add(run.id)
        try:
            return self._watched(client, run, job)
        except BaseException:
            _cancel(client, run.id)
            raise
        finally:
            self._sent.running.discard(run.id)

    def _watched(self, client: SyncPrefectClient, run: FlowRun, job: "_Job") -> State | None:
        sign, silence = None, 0.0
        while not self._sent.stopped.is_set():
            job.listen(str(run.id))
            if job.records.delivery() is not None:
                return None
            state = _patiently(lambda: client.read_flow_run(run.id)).state
            if state is None or state.is_final():
                return state
            now = (state.type, state.timestamp, job.heard(str(run.id)))
            # Times in which store or server did not answer tell nothing of the worker.
            sign, silence = now, silence + self.pause if now == sign else 0.0
            if silence > self._limit(state):
                return self._given_up(client, run.id)
            self._sent.stopped.wait(self.pause)
        raise JobError(f"job {job.name} was ended: the run was interrupted")

    def _limit(self, state: State) -> float:
        limits = {StateType.RUNNING: 1, StateType.PENDING: _START}
        return limits.get(state.type, float("inf")) * self.config.lost_after

    def _given_up(self, client: SyncPrefectClient, run: UUID) -> State:
        state: State = Crashed(message=f"gave no sign for {self.config.lost_after} s")
        _patiently(lambda: client.set_flow_run_state(run, state, force=True))
        return state


class _Job:
    """A job that is waited for, and how much of what its attempts tell was heard."""

    def __init__(self, name: str, records: JobRecords, on_event: EventCallback | None) -> None:
        self.name = name
        self.records = records
        self._on_event = on_event
        self._parts: dict[str, int] = {}

    def heard(self, attempt: str) -> int:
        """Return how many parts an attempt has told."""
        return self._parts.get(attempt, 0)

    def listen(self, attempt: str) -> None:
        """Pass on what an attempt has told since the last time."""
        while (events := self.records.told(attempt, self.heard(attempt))) is not None:
            self._parts[attempt] = self.heard(attempt) + 1
            for event in events:
                if self._on_event:
                    self._on_event(event)


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


def _cancel(client: SyncPrefectClient, run: UUID) -> None:
    try:
        client.set_flow_run_state(run, Cancelling())
    except (httpx.HTTPError, ObjectNotFound) as error:  # the run ends for another reason already
        get_run_logger().warning("flow run %s could not be cancelled: %s", run, error)


def _ending(name: str, state: State | None, retries: int) -> str:
    if state is None or state.is_completed():
        return f"job {name} ended, but its store has no results; look at its flow run"
    message = (state.message or "").rpartition("encountered an exception: ")[2]
    if state.is_cancelled():
        return f"job {name} was cancelled in Prefect; a new run sends it again"
    if state.is_crashed():
        return (
            f"job {name} lost its worker {retries + 1} times, at last: {message}; look at the "
            "worker's log, or raise execution.retries"
        )
    return message.removeprefix("JobError: ").removeprefix(f"{StoreError.__name__}: ")
