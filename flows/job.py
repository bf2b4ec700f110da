"""One job on a worker: the flow of the deployment that `execution.backend: deployment` sends to."""

import time
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from tasks.keys import job_source
from tclora.errors import JobError
from tclora.jobs.call import Call, Event
from tclora.jobs.parcel import Parcel
from tclora.jobs.records import JobRecords, Telling
from tclora.jobs.remote import check_function, perform
from tclora.registry import load_plugins
from tclora.store.objects import Store

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
    load_plugins()
    records = JobRecords(Store(store), key)
    parcel = records.parcel()
    check_function(parcel.function)
    _check_source(parcel)
    attempt = str(flow_run.id or "here")
    with Telling(records, attempt) as telling:
        perform(records, parcel, attempt, _Shown(telling).add)


def _check_source(parcel: Parcel) -> None:
    own = job_source(Call(function=parcel.function, arguments=parcel.arguments))
    if own != parcel.source:
        raise JobError(
            f"the worker's code must be the run's own, got another version of what "
            f"{parcel.function} executes (digest {own[:12]}, wanted {parcel.source[:12]}); install "
            "the same version on both"
        )


class _Shown:
    """Passes events on, and now and then shows one in the log."""

    def __init__(self, telling: Telling) -> None:
        self._telling = telling
        self._logged = float("-inf")

    def add(self, event: Event) -> None:
        """Take an event."""
        self._telling.add(event)
        if time.monotonic() - self._logged > _LOG_PAUSE:
            self._logged = time.monotonic()
            get_run_logger().info(", ".join(f"{name} {value}" for name, value in event.items()))
