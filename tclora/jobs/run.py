"""Functions run in processes of their own on this machine, followed while they work.

A job is one call of one function (`tclora.jobs.call`). A killed or failing job takes only itself
down; it dies with the process that started it.
"""

import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar

from tclora.errors import JobError
from tclora.jobs.call import EVENTS, Call, EventCallback, result_type
from tclora.jobs.devices import job_environment, lease_gpus, parallel_jobs, visible_gpus
from tclora.jobs.processes import Limits, Process, start_process
from tclora.jobs.usage import Sample, sorted_out

P = ParamSpec("P")
R = TypeVar("R")
SampleCallback = Callable[[str, Sample], None]  # of a job's name and what its process uses
_LOG_LINES = 15  # of standard error, shown when a job dies


class Executor(Protocol):
    """Where jobs run.

    Attributes
    ----------
    slots : int
        Jobs that run at once; more calls wait.
    """

    @property
    def slots(self) -> int:
        """Jobs that run at once."""

    def run_isolated(self, function: Callable[P, R], /, *args: P.args, **arguments: P.kwargs) -> R:
        """Run a function elsewhere and return its typed result; see `LocalExecutor`."""

    def shared_by(self, jobs: int) -> "Executor":
        """Return the executor for one of so many jobs that run beside each other."""

    def with_gpus(self, count: int) -> "Executor":
        """Return the executor for jobs of so many GPUs each, where there are any."""

    def watched_by(self, on_sample: SampleCallback) -> "Executor":
        """Return the executor with a callback for samples of what its jobs use."""

    def stop(self) -> None:
        """End what runs and start nothing more."""


@dataclass
class _Running:
    """The processes of an executor, and whether it was stopped."""

    processes: set[Process] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class LocalExecutor:
    """Runs each job in a process of its own, with GPUs leased to it or its share of the cores.

    Attributes
    ----------
    slots : int
        Jobs that run at once.
    timeout : float or None
        A job is killed after this time (s).
    parallel : int
        Jobs that share the cores; one alone gets them all.
    on_sample : callable or None
        Called with a job's name and a sample of what its process uses; see `tclora.jobs.usage`.
    gpus : int
        GPUs of each job, where there are any.
    """

    slots: int = 1
    timeout: float | None = None
    parallel: int = 1
    on_sample: SampleCallback | None = None
    gpus: int = 1
    _running: _Running = field(default_factory=_Running, repr=False)

    @classmethod
    def of(cls, jobs: int | str, timeout: float | None = None) -> "LocalExecutor":
        """Return an executor for so many jobs at once; "auto" is one per GPU, else per core."""
        return cls(parallel_jobs(jobs), timeout)

    def shared_by(self, jobs: int) -> "LocalExecutor":
        """Return the executor for one of so many jobs that run beside each other."""
        return replace(self, parallel=max(1, min(jobs, self.slots)))

    def with_gpus(self, count: int) -> "LocalExecutor":
        """Return the executor for jobs of so many GPUs each, where there are any."""
        return replace(self, gpus=count)

    def watched_by(self, on_sample: SampleCallback) -> "LocalExecutor":
        """Return the executor with a callback for samples of what its jobs use."""
        return replace(self, on_sample=on_sample)

    def run_isolated(self, function: Callable[P, R], /, *args: P.args, **arguments: P.kwargs) -> R:
        """Run a function in a process of its own and return its result.

        Parameters
        ----------
        function : callable
            At the top level of its module; its parameters and its result have types that travel as
            JSON (numbers, strings, paths, pydantic models, dataclasses and containers of them).
        **arguments
            Its arguments, by keyword. Where it has a parameter ``on_event``, the callable given
            for it is called in this thread with every progress event.

        Returns
        -------
        The function's result, of its annotated type.

        Raises
        ------
        JobError
            If the function raises a domain error, or the process is killed, dies or exceeds its
            time; the message carries its own error.
        """
        if args:
            raise TypeError(f"arguments of {function.__name__} must be given by keyword")
        on_event: Any = arguments.get(EVENTS)
        call, name = Call.of(function, arguments), job_name(function.__name__, arguments)
        on_sample = self.on_sample and partial(self.on_sample, name)
        found = self.run_call(call, name, sorted_out(on_event, on_sample))
        result: R = result_type(function).validate_python(found)
        return result

    def run_call(self, call: Call, name: str, on_event: EventCallback | None) -> Any:  # noqa: ANN401
        """Run a call in a process of its own and return its result as JSON; see `run_isolated`.

        Its events come with the samples of what its process uses among them.
        """
        if self._running.stopped.is_set():
            raise JobError(f"job {name} was not started: the run was interrupted")
        with (
            lease_gpus(visible_gpus(), self.gpus, stopped=self._running.stopped) as gpus,
            tempfile.TemporaryDirectory(prefix="tclora-job-") as scratch,
        ):
            spec, log = Path(scratch) / "call.json", Path(scratch) / "stderr"
            spec.write_text(call.model_dump_json(), encoding="utf-8")
            with log.open("wb") as errors, self._process(call, spec, errors, gpus) as process:
                outcome = _follow(process, on_event)
            if outcome is None:
                raise JobError(_death_notice(name, process.wait(), self.timeout, log))
        if "error" in outcome:
            raise JobError(f"job {name}: {outcome['error']}")
        return outcome["result"]

    def stop(self) -> None:
        """Kill all running jobs and start no waiting one.

        For interruptions: threads that wait for jobs cannot be stopped, their processes can.
        """
        self._running.stopped.set()
        for process in list(self._running.processes):
            process.kill()

    @contextmanager
    def _process(
        self, call: Call, spec: Path, errors: BinaryIO, gpus: list[str]
    ) -> Iterator[Process]:
        """Start the job; whatever ends the block (time, an exception, a signal), it ends too."""
        until = time.monotonic() + self.timeout if self.timeout else None
        limits = Limits(self._running.stopped, until)
        environment = job_environment(self.parallel, gpus)
        process = start_process(spec, call.module, environment, errors, limits, gpus=bool(gpus))
        left = until and max(0.0, until - time.monotonic())
        timer = threading.Timer(left, process.kill) if left is not None else None
        if timer:
            timer.daemon = True
            timer.start()
        self._running.processes.add(process)
        try:
            if self._running.stopped.is_set():  # between the first look and the start
                process.kill()
            yield process
            process.wait()
        finally:
            self._running.processes.discard(process)
            if timer:
                timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def job_name(function: str, arguments: Mapping[str, object]) -> str:
    """Name a job by its function and, where it has one, its argument `name`."""
    return " ".join([function, *([str(arguments["name"])] if "name" in arguments else [])])


def _follow(process: Process, on_event: EventCallback | None) -> dict[str, Any] | None:
    outcome = None
    for line in process.stdout or ():
        try:
            message = json.loads(line)
        except ValueError:  # printed before the job began, or cut off by its death
            continue
        if "event" not in message:
            outcome = message
        elif on_event:
            on_event(message["event"])
    return outcome


def _death_notice(name: str, code: int, timeout: float | None, log: Path) -> str:
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
    if code >= 0:
        cause = f"ended with exit code {code}"
    elif code == -signal.SIGKILL:
        limit = f", or its time limit of {timeout:.0f} s" if timeout else ""
        cause = f"was killed (by the system for lack of memory{limit}, or by hand)"
    else:
        cause = f"was ended by {signal.Signals(-code).name}"
    return f"job {name} {cause}" + (f"; it said last:\n{tail}" if tail else "")
