"""Flow runs that nobody works on any more, though the Prefect server has not been told.

A machine that is gone says nothing of its runs: they stay running for the server, and keep the
slots of their pool from others for ever. What tells is the store, where a living attempt leaves a
record every few seconds.
"""

import threading
import time
from collections.abc import Hashable
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from tclora.jobs.records import JobRecords

# Times `lost_after` without news; a worker may take long to start a job: images are pulled.
PATIENCE = {StateType.RUNNING: 1.0, StateType.PENDING: 3.0}
_LOOKS = 4  # in the time of `lost_after`


class LostRuns:
    """Ends flow runs of a deployment that have given no sign for a while.

    Only those that share the store of a job that waits: of others nothing can be known.

    Parameters
    ----------
    lost_after : float
        Silence (s) after which the worker of a job is taken for lost whose sender has said nothing
        of that, or has forgotten it.
    """

    def __init__(self, lost_after: float) -> None:
        self._lost_after = lost_after
        self._pause = lost_after / _LOOKS
        self._next = 0.0
        self._lock = threading.Lock()
        self._silent: dict[UUID, tuple[Hashable, float]] = {}
        self._parts: dict[UUID, int] = {}

    def end(self, client: SyncPrefectClient, deployment: UUID, waiting: JobRecords) -> None:
        """Look at the runs that hold slots, unless that was done just now; end those that are lost.

        Time in which the server or the store does not answer is not counted as silence.
        """
        if not self._lock.acquire(blocking=False):  # another thread looks
            return
        try:
            if time.monotonic() >= self._next:
                try:
                    self._look(client, deployment, waiting)
                finally:
                    self._next = time.monotonic() + self._pause
        finally:
            self._lock.release()

    def _look(self, client: SyncPrefectClient, deployment: UUID, waiting: JobRecords) -> None:
        states = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(PATIENCE)))
        ours = FlowRunFilterDeploymentId(any_=[deployment])
        wanted = FlowRunFilter(deployment_id=ours, state=states)
        oldest_first = FlowRunSort.START_TIME_ASC
        found = client.read_flow_runs(flow_run_filter=wanted, sort=oldest_first)
        if not waiting.is_sent():  # what is seen of the store is not the store: a mount is away
            return
        for run in found:
            if run.state and run.parameters.get("store") == waiting.store.url:
                records = JobRecords(waiting.store, str(run.parameters.get("key")))
                self._judge(client, run, run.state, records)

    def _judge(
        self, client: SyncPrefectClient, run: FlowRun, state: State, records: JobRecords
    ) -> None:
        self._parts[run.id] = parts = records.parts(str(run.id), self._parts.get(run.id, 0))
        news = (state.type, state.timestamp, parts)
        former, silence = self._silent.get(run.id, (None, 0.0))
        silence = silence + self._pause if former == news else 0.0
        self._silent[run.id] = news, silence
        if silence <= PATIENCE[state.type] * (records.lost_after() or self._lost_after):
            return
        told = f"gave no sign for {silence:.0f} s and kept a slot from others"
        try:
            now = client.read_flow_run(run.id).state
            if now is None or (now.type, now.timestamp) != (state.type, state.timestamp):
                return
            crashed: State = Crashed(message=told)
            client.set_flow_run_state(run.id, crashed)
        except ObjectNotFound:  # somebody has removed it
            return
        get_run_logger().warning("flow run %s %s; it is taken for lost", run.name, told)
