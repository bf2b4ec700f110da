"""Jobs on other machines: sent through a store, followed, sent again when their worker is lost.

Files travel through a store (`tclora.jobs.parcel`). What a job is, is its key: a run that was
killed and is started again finds what its jobs have delivered. Where attempts at a job are made is
a fleet's to say: flow runs (`tasks.deployed`), Ray tasks (`tasks.ray_tasks`) or Dask tasks
(`tasks.dask_tasks`).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import get_run_logger

from tasks.fleet import Attempt, Ending, Fate, Fleet, SentJob
from tasks.keys import current_key, current_name, job_source
from tclora.config import ExecutionConfig
from tclora.errors import JobError
from tclora.files import sha256_json
from tclora.jobs.call import EVENTS, Call, result_type
from tclora.jobs.parcel import Delivery, Packed
from tclora.jobs.records import JobRecords
from tclora.jobs.remote import accept
from tclora.jobs.run import SampleCallback
from tclora.jobs.usage import sorted_out
from tclora.store.objects import Store

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Sent:
    """The jobs of an executor: attempts under way, keys of all, and whether it was stopped."""

    running: list[Attempt] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class RemoteExecutor:
    """Runs each job on whichever worker of a fleet takes it.

    Attributes
    ----------
    fleet : Fleet
        Where attempts are made.
    store : Store
        Through which files travel.
    config : ExecutionConfig
        What is done about lost workers, and how many jobs share a worker's host.
    scratch : Path
        Folder whose files stay where a job runs.
    slots : int
        Jobs that are sent at once.
    timeout : float or None
        A job is ended after this time (s).
    pause : float
        Time between two looks at a job (s).
    beside : int or None
        Jobs that share this machine's cores, where the workers are this machine's.
    on_sample : callable or None
        Called with a job's name and a sample of what it uses where it runs.
    gpus : int
        GPUs of each job, where there are any.
    """

    fleet: Fleet
    store: Store
    config: ExecutionConfig
    scratch: Path
    slots: int
    timeout: float | None = None
    pause: float = 2.0
    beside: int | None = None
    on_sample: SampleCallback | None = None
    gpus: int = 1
    _sent: _Sent = field(default_factory=_Sent, repr=False)

    def shared_by(self, jobs: int) -> "RemoteExecutor":
        """Return the executor for one of so many jobs; see `tclora.jobs.run.LocalExecutor`.

        What a job has of another machine is not for the sender to say.
        """
        if self.beside is None:
            return self
        return replace(self, beside=max(1, min(jobs, self.slots)))

    def with_gpus(self, count: int) -> "RemoteExecutor":
        """Return the executor for jobs of so many GPUs each, where there are any."""
        return replace(self, gpus=count)

    def watched_by(self, on_sample: SampleCallback) -> "RemoteExecutor":
        """Return the executor with a callback for samples of what its jobs use."""
        return replace(self, on_sample=on_sample)

    def run_isolated(self, function: Callable[P, R], /, *args: P.args, **arguments: P.kwargs) -> R:
        """Run a function on a worker; see `tclora.jobs.run.LocalExecutor`.

        Raises
        ------
        JobError
            If the function raises a domain error, its attempt is cancelled, or worker after
            worker is lost.
        StoreError
            If the store cannot be used.
        """
        if args:
            raise TypeError(f"arguments of {function.__name__} must be given by keyword")
        on_event: Any = arguments.get(EVENTS)
        packed = Packed.of(function, arguments)
        paths = [str(path) for path in packed.paths]
        key = sha256_json([current_key(), packed.function, packed.arguments, paths])
        name = current_name()
        on_sample = self.on_sample and partial(self.on_sample, name)
        hear = sorted_out(on_event, on_sample)
        job = SentJob(name, JobRecords(self.store, key), hear, self.gpus)
        self._sent.keys.add(key)
        delivery = job.records.delivery()
        if delivery is None:
            self._send(job, packed)
            delivery = self._made(job)
        else:
            get_run_logger().info("%s: was finished after the run that sent it had ended", job.name)
        job.listen(delivery.attempt)
        accept(delivery, job.records, packed.places)
        result: R = result_type(function).validate_python(delivery.unpacked(packed.places))
        return result

    def stop(self) -> None:
        """Cancel all attempts that are under way and send nothing more."""
        self._sent.stopped.set()
        for attempt in list(self._sent.running):
            attempt.cancel()

    def forget(self) -> None:
        """Remove the records of all jobs: what they made is in the run's own hands now."""
        for key in self._sent.keys:
            JobRecords(self.store, key).forget()

    def _send(self, job: SentJob, packed: Packed) -> None:
        parcel = packed.sent(
            self.store,
            self.scratch,
            source=job_source(Call(function=packed.function, arguments=packed.arguments)),
            beside=self.beside or self.config.jobs_per_host,
            gpus=self.gpus,
            timeout=self.timeout,
            lost_after=self.config.lost_after,
            models=self.config.store is not None,  # else workers see this machine's folders
        )
        job.records.send(parcel)

    def _made(self, job: SentJob) -> Delivery:
        """Make attempts at a job until a worker lives long enough to do it."""
        for number in range(self.config.retries + 1):
            if number:
                self._sent.stopped.wait(min(60, self.pause * 2**number))
            if self._sent.stopped.is_set():
                raise JobError(f"job {job.name} was not started: the run was interrupted")
            with self.fleet.attempt(job) as attempt:
                ending = self._followed(attempt, job)
            delivery = job.records.delivery()
            if delivery is not None:
                return delivery
            if ending.fate != Fate.LOST:
                break
            get_run_logger().warning("%s: lost its worker: %s", job.name, ending.message)
        raise JobError(self._last_words(job.name, ending))

    def _followed(self, attempt: Attempt, job: SentJob) -> Ending:
        """Wait for the end of an attempt; whatever else ends the wait cancels it."""
        self._sent.running.append(attempt)
        try:
            return self._watched(attempt, job)
        except BaseException:
            attempt.cancel()
            raise
        finally:
            self._sent.running.remove(attempt)

    def _watched(self, attempt: Attempt, job: SentJob) -> Ending:
        former, silence = None, 0.0
        while not self._sent.stopped.is_set():
            job.listen(attempt.name)
            if job.records.delivery() is not None:
                return Ending(Fate.DONE)
            found = attempt.look(job.heard(attempt.name))
            if isinstance(found, Ending):
                if self._sent.stopped.is_set():  # by which it has ended
                    break
                return found
            news = (found.news, job.heard(attempt.name))
            # Times in which store or server did not answer tell nothing of the worker.
            former, silence = news, silence + self.pause if news == former else 0.0
            if silence > found.patience * self.config.lost_after:
                message = f"gave no sign for {self.config.lost_after} s"
                attempt.give_up(message)
                return Ending(Fate.LOST, message)
            self._sent.stopped.wait(self.pause)
        raise JobError(f"job {job.name} was ended: the run was interrupted")

    def _last_words(self, name: str, ending: Ending) -> str:
        if ending.fate == Fate.DONE:
            return f"job {name} ended, but its store has no results; look at the worker's log"
        if ending.fate == Fate.CANCELLED:
            return f"job {name} was cancelled in {self.fleet.name}; a new run sends it again"
        if ending.fate == Fate.LOST:
            return (
                f"job {name} lost its worker {self.config.retries + 1} times, at last: "
                f"{ending.message}; look at the worker's log, or raise execution.retries"
            )
        return ending.message
