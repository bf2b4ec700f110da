"""Records of training and machines in MLflow, as a job works or at once when it is done."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from prefect import get_run_logger

from tasks.tracking import BATCH, PARAM_LENGTH, Run, close_run, metric_name, nested_run
from tclora.jobs.usage import SAMPLE, Sample

Record = Mapping[str, float]
_HOST = "tclora.host"  # tag: the machine of a process; with a job's name, of that job


@contextmanager
def live_run(parent: Run, name: str, tags: Mapping[str, str]) -> Iterator["StepLogger"]:
    """Nested run that receives records while a job works; FAILED if the block raises."""
    run = nested_run(parent, name, tags)
    logger = StepLogger(run)
    try:
        yield logger
    except BaseException as error:
        logger.flush()
        with _without_store("that a job has failed"):
            run.client.set_tag(run.run_id, "tclora.error", str(error)[:PARAM_LENGTH])
            close_run(run, "FAILED")
        raise
    logger.flush()
    with _without_store("that a job is finished"):
        close_run(run, "FINISHED")


@contextmanager
def _without_store(what: str) -> Iterator[None]:
    """Go on where MLflow cannot be told: a job is worth more than its run's state there."""
    try:
        yield
    except MlflowException as error:
        get_run_logger().warning("MLflow was not told %s: %s", what, error)


class StepLogger:
    """Sends training records to MLflow in batches, at most one call every few seconds."""

    def __init__(self, run: Run, interval: float = 5.0) -> None:
        self.run = run
        self._interval = interval
        self._buffer: list[Metric] = []
        self._hosts: dict[str, list[str]] = {}  # tag -> machines
        self._untold: set[str] = set()  # tags
        self._samples = 0
        self._sent = time.monotonic()

    def add(self, record: Record) -> None:
        """Take one step's record; ``step`` is its position, the rest are metrics."""
        stamp = int(time.time() * 1000)
        self._buffer += [
            Metric(name, value, stamp, int(record["step"]))
            for name, value in record.items()
            if name != "step"
        ]
        if time.monotonic() - self._sent > self._interval:
            self.flush()

    def add_sample(self, sample: Sample, job: str = "") -> None:
        """Take what a process uses; the UI shows it under System metrics, each job by itself.

        The run's tag ``tclora.host`` tells the machine; those of several attempts, in their order.
        """
        name = metric_name(f"{_HOST}.{job}" if job else _HOST)
        hosts = self._hosts.setdefault(name, [])
        if sample.host not in hosts:
            hosts.append(sample.host)
            self._untold.add(name)
        prefix = metric_name(f"{SAMPLE}/{job}/" if job else f"{SAMPLE}/")
        self.add(
            {f"{prefix}{name}": value for name, value in sample.used.items()}
            | {"step": self._samples}
        )
        self._samples += 1

    def flush(self) -> None:
        """Send what is buffered; a store that fails now is tried again at the next flush."""
        try:
            for name in sorted(self._untold):
                self.run.client.set_tag(self.run.run_id, name, ", ".join(self._hosts[name]))
                self._untold.discard(name)
            while self._buffer:
                self.run.client.log_batch(self.run.run_id, metrics=self._buffer[:BATCH])
                del self._buffer[:BATCH]
        except MlflowException as error:  # training is worth more than its curve
            get_run_logger().warning("MLflow did not take the metrics: %s", error)
        self._sent = time.monotonic()


def log_history(run: Run, history: Iterable[Record]) -> None:
    """Log finished training records at once."""
    logger = StepLogger(run, interval=float("inf"))
    for record in history:
        logger.add(record)
    logger.flush()
