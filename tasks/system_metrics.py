"""MLflow's system metrics of a run: what its own process and those of its jobs use."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock

from tasks.live_runs import StepLogger
from tasks.tracking import Run
from tclora.jobs.run import Executor
from tclora.jobs.usage import Sample, Sampling


@contextmanager
def watching(run: Run, executor: Executor) -> Iterator[Executor]:
    """Log what this process and jobs use while a block runs; give the executor for the jobs.

    Parameters
    ----------
    run : Run
        Takes ``system/...`` of this process, and ``system/JOB/...`` of each job that has no run of
        its own.
    executor : Executor
        Runs the jobs, on whatever machines.
    """
    loggers: defaultdict[str, StepLogger] = defaultdict(lambda: StepLogger(run))
    lock = Lock()

    def log(job: str, sample: Sample) -> None:
        with lock:  # jobs run beside each other
            loggers[job].add_sample(sample, job.replace(" ", "-"))

    try:
        with Sampling(partial(log, "")):
            yield executor.watched_by(log)
    finally:
        for logger in loggers.values():
            logger.flush()
