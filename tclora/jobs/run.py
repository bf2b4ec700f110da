"""Jobs in their own process: what they are told, and how they are started and followed.

A job is a JSON file that `tclora.jobs.worker` runs in a process of its own. A killed or failing job
takes only itself down.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field

from tclora.config import EvaluateConfig, FactoriseConfig, TrainConfig
from tclora.errors import JobError

EventCallback = Callable[[dict[str, float]], None]
_LOG_LINES = 15  # of standard error, shown when a job dies
_running: set[subprocess.Popen[str]] = set()
_interrupted = threading.Event()


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Told):
    """The base model of a job, and how rows become its tokens.

    Attributes
    ----------
    location : str
        Path or hub id.
    digest : str
        Which model that is; see `tclora.model.locate.model_digest`.
    dtype : {"auto", "bfloat16", "float32"}
        Type of its weights.
    template : {"chat", "plain"}
        How a prompt is written.
    max_tokens : int
        Longest example.
    """

    location: str
    digest: str
    dtype: str
    template: Literal["chat", "plain"]
    max_tokens: int

    @classmethod
    def of(cls, location: str, digest: str, train: TrainConfig) -> "Base":
        """Return the base as a run's training sees it."""
        return cls(
            location=location,
            digest=digest,
            dtype=train.dtype,
            template=train.template,
            max_tokens=train.max_tokens,
        )


class _Job(_Told):
    name: str
    base: Base
    target: Path


class TrainJob(_Job):
    """Train one adapter on the rows of a Parquet file (columns prompt, response)."""

    kind: Literal["train"] = "train"
    rows: Path
    train: TrainConfig
    seed: int
    init_seed: int
    checkpoint: Path


class EvaluateJob(_Job):
    """Evaluate one method on the rows of a Parquet file (canonical columns and cluster).

    `adapters` holds one PEFT directory for all rows, one per cluster, or none for the base model.
    """

    kind: Literal["evaluate"] = "evaluate"
    rows: Path
    evaluate: EvaluateConfig
    adapters: dict[str, Path]  # "all" or the cluster's number -> directory
    harness_target: Path | None = None  # where lm-eval's figures go, if they are asked for
    routed: Path | None = None  # a routed library to measure instead of adapters
    routing: Path | None = None  # Parquet file of its routing, one row per evaluated row


class _LibraryJob(_Job):
    """A job on some rows of every cluster."""

    rows: dict[str, Path]  # cluster's adapter -> Parquet file
    count: int  # rows per cluster
    token_budget: int  # padded tokens per forward pass


class StatisticsJob(_LibraryJob):
    """Collect the clusters' activation statistics on their first rows; see `tclora.merge.collect`.

    `target` is a folder; it gets one file per cluster.
    """

    kind: Literal["statistics"] = "statistics"
    modules: tuple[str, ...]


class _MergeJob(_LibraryJob):
    """A job that merges the clusters' adapters. `target` is a JSON file of the outcome."""

    adapters: dict[str, Path]
    statistics: tuple[Path, ...]
    method: str
    seed: int


class ScaleJob(_MergeJob):
    """Choose a method's scale on the clusters' first rows; see `tclora.merge.tune_scale`."""

    kind: Literal["scale"] = "scale"
    scales: tuple[float, ...]
    factors: Path | None
    rank: int | None


class RefineJob(_LibraryJob):
    """Refit the component weights of a merge; see `tclora.merge.calibrate_components`.

    `target` is the directory of the refitted adapter; rows are the first ones of each cluster.
    """

    kind: Literal["refine"] = "refine"
    adapter: Path
    steps: int


class RankJob(_MergeJob):
    """Find the smallest CP rank with a wanted recovery; see `tclora.tune.rank`.

    Rows are the last ones of each cluster: statistics come from the first.
    """

    kind: Literal["rank"] = "rank"
    recovery: float
    factorise: FactoriseConfig


Job = Annotated[
    TrainJob | EvaluateJob | StatisticsJob | ScaleJob | RefineJob | RankJob,
    Field(discriminator="kind"),
]


def run_job(
    job: Job,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    on_event: EventCallback | None = None,
) -> dict[str, Any]:
    """Run a job in a fresh process and return its result.

    Parameters
    ----------
    job : one of `Job`
        What to do.
    env : mapping, optional
        Environment variables on top of this process's own, such as CUDA_VISIBLE_DEVICES.
    timeout : float, optional
        The job is killed after this time (s).
    on_event : callable, optional
        Called in this thread with every progress event.

    Returns
    -------
    dict
        The job's result.

    Raises
    ------
    JobError
        If the job fails, is killed or exceeds its time; the message carries its own error.
    """
    if _interrupted.is_set():
        raise JobError(f"job {job.name} was not started: the run was interrupted")
    with tempfile.TemporaryDirectory(prefix="tclora-job-") as scratch:
        spec = Path(scratch) / "job.json"
        spec.write_text(job.model_dump_json())
        log = Path(scratch) / "stderr"
        with log.open("wb") as errors, _process(spec, errors, env or {}, timeout) as process:
            result = _follow(process, on_event)
        if result is None:
            raise JobError(_death_notice(job.name, process.returncode, timeout, log))
        if "error" in result:
            raise JobError(f"job {job.name}: {result['error']}")
        return result


@contextmanager
def stopping_jobs() -> Iterator[None]:
    """Kill all running jobs, and start no waiting one, if the block is left by an exception.

    For interruptions: threads that wait for jobs cannot be stopped, their processes can.
    """
    _interrupted.clear()
    try:
        yield
    except BaseException:
        _interrupted.set()
        for process in list(_running):
            process.kill()
        raise


@contextmanager
def _process(
    spec: Path,
    errors: BinaryIO,
    env: Mapping[str, str],
    timeout: float | None,
) -> Iterator[subprocess.Popen[str]]:
    """Start the job; whatever ends the block (time, an exception, a signal), the job ends too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tclora.jobs.worker", str(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **env},
    )
    timer = threading.Timer(timeout, process.kill) if timeout else None
    if timer:
        timer.daemon = True
        timer.start()
    _running.add(process)
    try:
        yield process
        process.wait()
    finally:
        _running.discard(process)
        if timer:
            timer.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def _follow(
    process: subprocess.Popen[str], on_event: EventCallback | None
) -> dict[str, Any] | None:
    result = None
    for line in process.stdout or ():
        try:
            event = json.loads(line)
        except ValueError:  # printed before the job began, or cut off by its death
            continue
        if "result" in event:
            result = event["result"]
        elif on_event:
            on_event(event)
    return result


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
