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
from prefect.states import Crashed

from tclora.errors import StoreError
from tclora.jobs.records import JobRecords
from tclora.store.objects import Store

# Times `lost_after` without news; a worker may take long to start a job: images are pulled.
PATIENCE = {StateType.RUNNING: 1.0, StateType.PENDING: 3.0}
_LOOKS = 4  # in the time of `lost_after`


class LostRuns:
    """Ends flow runs of a deployment that have given no sign for a while.

    Parameters
    ----------
    lost_after : float
        Silence (s) after which a running job's worker is taken for lost.
    """

    def __init__(self, lost_after: float) -> None:
        self._pause = lost_after / _LOOKS
        self._next = 0.0
        self._lock = threading.Lock()
        self._silent: dict[UUID, tuple[Hashable, int]] = {}

    def end(self, client: SyncPrefectClient, deployment: UUID) -> None:
        """Look at the runs that hold slots, unless that was done just now; end those that are lost.

        Time in which the server or the store does not answer is not counted as silence.
        """
        if not self._lock.acquire(blocking=False):  # another thread looks
            return
        try:
            if time.monotonic() < self._next:
                return
            states = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(PATIENCE)))
            ours = FlowRunFilterDeploymentId(any_=[deployment])
            wanted = FlowRunFilter(deployment_id=ours, state=states)
            for run in client.read_flow_runs(flow_run_filter=wanted):
                self._judge(client, run)
            self._next = time.monotonic() + self._pause
        finally:
            self._lock.release()

    def _judge(self, client: SyncPrefectClient, run: FlowRun) -> None:
        state = run.state
        if state is None:
            return
        try:
            store, key = run.parameters["store"], run.parameters["key"]
            news = (state.type, state.timestamp, JobRecords(Store(store), key).parts(str(run.id)))
        except StoreError as error:
            get_run_logger().debug("nothing is known of flow run %s: %s", run.name, error)
            return
        former, looks = self._silent.get(run.id, (None, 0))
        looks = looks + 1 if former == news else 0
        self._silent[run.id] = news, looks
        if looks <= PATIENCE[state.type] * _LOOKS:
            return
        told = f"gave no sign for {self._pause * looks:.0f} s and kept a slot from others"
        final: State = Crashed(message=told)
        client.set_flow_run_state(run.id, final, force=True)
        get_run_logger().warning("flow run %s %s; it is taken for lost", run.name, told)
