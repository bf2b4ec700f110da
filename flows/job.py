"""One job on a worker: the flow of the deployment that `execution.backend: deployment` sends to."""

import time
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from tasks.attempts import Received
from tclora.jobs.call import Event
from tclora.jobs.usage import SAMPLE

_LOG_PAUSE = 15.0  # s between lines of progress


@flow(name="job")
def job(
    store: Annotated[str, Field(description="URL of the store that the run and its jobs share")],
    key: Annotated[str, Field(description="what the job is", pattern="^[0-9a-f]{64}$")],
) -> None:
    """Run one job of a pipeline; pipelines send these, there is no need to start one by hand.

    Parameters
    ----------
    store : str
        URL of the store that holds the job.
    key : str
        The job's key.

    Raises
    ------
    JobError
        If the job fails, or this machine has another version of the code.
    StoreError
        If the store has no such job, or lacks something.
    """
    Received.of(store, key).perform(str(flow_run.id or "here"), _Shown().add)


class _Shown:
    """Now and then shows an event in the log."""

    def __init__(self) -> None:
        self._logged = float("-inf")

    def add(self, event: Event) -> None:
        """Take an event."""
        if SAMPLE in event:
            return
        if time.monotonic() - self._logged > _LOG_PAUSE:
            self._logged = time.monotonic()
            get_run_logger().info(", ".join(f"{name} {value}" for name, value in event.items()))
