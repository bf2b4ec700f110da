"""Opening a run: its lock, its staging area, its MLflow run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.context import Context
from tasks import tracking
from tasks.executing import executing
from tasks.progress import JobProgress
from tasks.shared import LinkedStages, stored_stages
from tasks.system_metrics import watching
from tasks.tracking import Run
from tasks.where import Where
from tclora.config import Config
from tclora.jobs.devices import exclusive
from tclora.jobs.run import Executor
from tclora.library.layout import Layout
from tclora.library.places import staging_area
from tclora.library.staging import begin
from tclora.model.locate import choose_dtype, default_device
from tclora.preflight import Models


@contextmanager
def opened(
    config: Config, models: Models, records: Path | None = None, around: Executor | None = None
) -> Iterator[Context]:
    """Open a run on a library that is its own until the block is left.

    `records` is the folder of records of what it has in common with other runs, if it shares, and
    `around` the executor of the run that it is part of.

    A second run on the same folder waits for the first, then finds everything cached. The MLflow
    run is FAILED or KILLED if the block raises, and does not exist before the run begins.
    """
    library = config.library_dir
    lock = library.with_name(f".{config.name}.lock")
    staging = Layout(staging_area(library))
    with (
        exclusive(lock, on_wait=_say_waiting),
        executing(config, staging, around) as executor,
        _mlflow_run(config, models) as run,
        watching(run, executor) as watched,
    ):
        begin(library)
        steps = config.train.checkpoint_steps
        shared = [*([LinkedStages(records)] if records else []), *stored_stages(config)]
        where = Where(staging, run, watched, JobProgress(), steps, shared)
        yield Context(_settled(config), models, where, records)


def _settled(config: Config) -> Config:
    """Write the weights' type in place of "auto", so that unlike machines share no results."""
    dtype = str(choose_dtype(config.train.dtype, default_device())).removeprefix("torch.")
    return config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})


def _say_waiting(holder: Mapping[str, float]) -> None:
    who = "another run holds this library"
    if holder:
        who += f" (pid {holder['pid']:.0f}, for {holder['seconds']:.0f} s)"
    get_run_logger().info("waiting: %s", who)


@contextmanager
def _mlflow_run(config: Config, models: Models) -> Iterator[Run]:
    """Open the parent MLflow run, linked to this flow run and naming models by their digests."""
    tags = {
        "tclora.base_model_digest": models.base_digest,
        "tclora.embedding_model_digest": models.embedder_digest,
        "prefect.flow_run_id": flow_run.id or "",
        "prefect.flow_run_name": flow_run.name or "",
    }
    url = flow_run.ui_url or ""
    if url.startswith("http"):  # there is no UI to link to without a server of the user's own
        tags["prefect.flow_run_url"] = url
    run = tracking.open_run(config, flow_run.name or config.name, tags)
    try:
        yield run
    except BaseException as error:
        tracking.close_run(run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracking.close_run(run, "FINISHED")
