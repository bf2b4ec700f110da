"""Attempts at jobs as Dask tasks, on a cluster that is there or one of this run's own.

Plain tasks through Dask's own client: what travels is the name of a job. A scheduler that has lost
a worker gives its task to another by itself; that one refuses it, and another attempt is the
executor's to make (`tasks.remote`), which counts them and tells of them.
"""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.attempts import do_job
from tasks.fleet import Ending, Fate, SentJob, Sign, gpus_asked
from tclora.errors import ConfigError, JobError
from tclora.jobs.devices import visible_gpus
from tclora.jobs.records import JobRecords
from tclora.jobs.run import LocalExecutor
from tclora.store.objects import Store

if TYPE_CHECKING:
    from distributed import Client, Future

GPU = "GPU"  # name of the resource: dask worker --resources GPU=1
_TIMEOUT = 30  # s to connect
_LOOK = 1.0  # s between two looks whether a job is still wanted
# A scheduler and workers of this run's own look after themselves less often than every few
# milliseconds: that took more of a core than all the jobs that they pass on.
_QUIET = {
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.tick.interval": "1s",
    "distributed.worker.profile.enabled": False,
}


class LostAttemptError(Exception):
    """A scheduler has sent an attempt again because its worker was lost."""


@dataclass(frozen=True)
class DaskTasks:
    """Makes each attempt as a Dask task.

    Attributes
    ----------
    client : Client
        Connected to the scheduler.
    gpus : int
        Whether a job asks for its GPUs, 1 or 0, of a worker's resource ``GPU``.
    name : str
        What messages call it.
    """

    client: "Client"
    gpus: int
    name: str = "Dask"

    @contextmanager
    def attempt(self, job: SentJob) -> Iterator["_Attempt"]:
        """Send a job."""
        name = uuid.uuid4().hex
        resources = {GPU: self.gpus * job.gpus} if self.gpus else None
        given = job.records.store.url, job.records.key, name
        if self.client.status != "running":
            raise JobError(
                f"job {job.name} cannot be sent: the Dask scheduler has closed the connection; "
                "start it and run again"
            )
        future = self.client.submit(
            do_dask_job, *given, key=f"{job.name}-{name}", resources=resources, pure=False
        )
        yield _Attempt(name, job.name, future)


class _Attempt:
    """A Dask task."""

    def __init__(self, name: str, job: str, future: "Future[str | None]") -> None:
        self.name = name
        self._job = job
        self._future = future

    def look(self, heard: int) -> Ending | Sign:
        """Look what the scheduler has told of the task."""
        from distributed.scheduler import KilledWorker

        status = self._future.status
        if status == "pending":
            return Sign(patience=1 if heard else float("inf"))
        if status == "finished":
            failure = self._future.result()
            return Ending(Fate.FAILED, failure) if failure else Ending(Fate.DONE)
        if status != "error":  # lost, cancelled: with the scheduler, or by it
            return Ending(Fate.LOST, f"the scheduler has {status} it")
        error = self._future.exception()
        if isinstance(error, (LostAttemptError, KilledWorker)):
            return Ending(Fate.LOST, str(error).splitlines()[0])
        return Ending(Fate.FAILED, f"job {self._job} failed on its worker: {error!r}")

    def cancel(self) -> None:
        """Withdraw the task; its worker ends the job."""
        self._future.cancel(force=True)

    def give_up(self, message: str) -> None:
        """Withdraw the task."""
        self.cancel()


def do_dask_job(store: str, key: str, attempt: str) -> str | None:
    """Do a job in a thread of a Dask worker; see `tasks.attempts.do_job`.

    Raises
    ------
    LostAttemptError
        If the attempt was begun by another worker.
    """
    if not JobRecords(Store(store), key).begin(attempt):
        raise LostAttemptError("its worker died, and the scheduler gave the task to another")
    return do_job(store, key, attempt, _while_wanted)


@contextmanager
def _while_wanted(executor: LocalExecutor) -> Iterator[None]:
    """End a job whose task was withdrawn, or whose sender is gone: Dask cannot end a thread."""
    from distributed import get_worker

    worker, ended = get_worker(), threading.Event()
    key = worker.get_current_task()

    def watch() -> None:
        while not ended.wait(_LOOK):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                executor.stop()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def dask_tasks(
    address: str | None, gpus: int | str, workers: int, most: int = 1
) -> Iterator[DaskTasks]:
    """Connect to a Dask scheduler, or start a cluster here that ends with the block.

    Parameters
    ----------
    address : str or None
        ``"HOST:PORT"`` of a scheduler; None starts one, and workers.
    gpus : int or "auto"
        What a job asks for of the resource ``GPU``; "auto": one if any worker has it.
    workers : int
        Workers of a cluster of this run's own.
    most : int
        GPUs of the largest job.

    Yields
    ------
    DaskTasks

    Raises
    ------
    ConfigError
        If there is no such scheduler, or all its workers have fewer GPUs than the largest job.
    """
    from distributed import Client

    with _scheduler(address, workers) as scheduler:
        try:
            client = Client(scheduler, timeout=_TIMEOUT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"execution.dask_address must be a Dask scheduler's, got {address!r}: "
                f"{str(error).splitlines()[0]}; name the one that `dask scheduler` prints"
            ) from error
        with client:
            there = client.scheduler_info(n_workers=-1)["workers"].values()
            largest = max((int(worker["resources"].get(GPU, 0)) for worker in there), default=0)
            yield DaskTasks(client, gpus_asked(gpus, largest, most, "a Dask worker's resource GPU"))


@contextmanager
def _scheduler(address: str | None, workers: int) -> Iterator[str]:
    """Give the address of a scheduler; without one, start one with workers on the loopback."""
    if address:
        yield address
        return
    import dask
    from distributed import LocalCluster

    with (
        dask.config.set(_QUIET),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            memory_limit=None,  # it would count the worker, and not its jobs
            resources={GPU: len(gpus)} if (gpus := visible_gpus()) else None,  # locks share them
        ) as cluster,
    ):
        yield cluster.scheduler_address
