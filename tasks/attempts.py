"""What a worker does of a job that was sent to it, whatever has brought the order."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tasks.keys import job_source
from tclora.errors import JobError, TcloraError
from tclora.jobs.call import Call, EventCallback
from tclora.jobs.parcel import Parcel
from tclora.jobs.records import JobRecords
from tclora.jobs.remote import check_function, local_executor, perform
from tclora.jobs.run import LocalExecutor
from tclora.registry import load_plugins
from tclora.store.objects import Store


@dataclass(frozen=True)
class Received:
    """A job that has come to this machine.

    Attributes
    ----------
    records : JobRecords
        Of the job.
    parcel : Parcel
        The job.
    executor : LocalExecutor
        Runs it in a process of its own; to be stopped if nobody wants it any more.
    """

    records: JobRecords
    parcel: Parcel
    executor: LocalExecutor

    @classmethod
    def of(cls, store: str, key: str) -> "Received":
        """Read a job, and check that this machine may and can do it.

        Raises
        ------
        JobError
            If its function is none of ours, or this machine has another version of the code.
        StoreError
            If the store has no such job.
        """
        load_plugins()
        records = JobRecords(Store(store), key)
        parcel = records.parcel()
        check_function(parcel.function)
        check_source(parcel)
        return cls(records, parcel, local_executor(parcel))

    def perform(self, attempt: str, on_event: EventCallback = lambda _: None) -> None:
        """Do the job; see `tclora.jobs.remote.perform`."""
        perform(self.records, self.parcel, attempt, on_event, self.executor)


def do_job(
    store: str,
    key: str,
    attempt: str,
    while_wanted: Callable[[LocalExecutor], AbstractContextManager[object]] = nullcontext,
) -> str | None:
    """Do a job that a Ray or Dask scheduler has brought.

    Parameters
    ----------
    store : str
        URL of the store that holds the job.
    key : str
        The job's key.
    attempt : str
        Which attempt this is.
    while_wanted : callable, optional
        Makes a context of the executor, around the work.

    Returns
    -------
    str or None
        What has failed; as text, since exceptions travel by pickling. None if the job is done.
    """
    try:
        received = Received.of(store, key)
        with while_wanted(received.executor):
            received.perform(attempt)
    except TcloraError as error:
        return str(error)
    return None


def check_source(parcel: Parcel) -> None:
    """Refuse a job of another version of the code.

    Raises
    ------
    JobError
        If the source that the job would execute here is not the sender's.
    """
    own = job_source(Call(function=parcel.function, arguments=parcel.arguments))
    if own != parcel.source:
        raise JobError(
            f"the worker's code must be the run's own, got another version of what "
            f"{parcel.function} executes (digest {own[:12]}, wanted {parcel.source[:12]}); install "
            "the same version on both"
        )
