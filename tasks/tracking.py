"""MLflow: one parent run per pipeline run, nested runs per training job and evaluated method.

Everything goes through `MlflowClient` with explicit run ids, because Prefect runs tasks in threads
and MLflow's active run is a thread's own.
"""

import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param
from prefect import get_run_logger
from pydantic import BaseModel, ConfigDict

from tasks.provenance import code_tags, environment
from tclora.config import Config
from tclora.files import write_text
from tclora.jobs.devices import exclusive

BATCH = 500  # metrics per call; MLflow allows 1000
PARAM_LENGTH = 6000
# The UI opens an experiment of this kind at its runs, others at traces of an application.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_LIBRARY = "tclora.library"  # tag: the folder a run works on
_PLACE = "tclora.place"  # tag: what that folder is known by on every machine


class Run(BaseModel):
    """Where to log: a run of an MLflow store."""

    model_config = ConfigDict(frozen=True)

    uri: str
    experiment_id: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client of the store."""
        return MlflowClient(self.uri)


def tracking_uri(output: Path) -> str:
    """Return ``$MLFLOW_TRACKING_URI``, or the sqlite store in the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output.absolute()}/mlflow.db"


def open_run(config: Config, run_name: str, tags: Mapping[str, str]) -> Run:
    """Start the parent run of a pipeline run; creates store and experiment where missing.

    Parameters
    ----------
    config : Config
        Logged as parameters; its name is the experiment's.
    run_name : str
        Name of the run, the same as Prefect's.
    tags : mapping
        Such as the links to Prefect.
    """
    uri, experiment_id = _open_experiment(config.output, config.name)
    client = MlflowClient(uri)
    place = f"{_folder_id(config.output)}/{config.name}"
    _close_abandoned(client, experiment_id, place)
    tags = {**code_tags(), **tags, _LIBRARY: str(config.library_dir), _PLACE: place}
    created = client.create_run(experiment_id, run_name=run_name, tags=tags)
    run = Run(uri=uri, experiment_id=experiment_id, run_id=created.info.run_id)
    log_params(run, _flatten(config.model_dump(mode="json")))
    client.log_dict(run.run_id, config.model_dump(mode="json"), "config.yaml")
    client.log_dict(run.run_id, environment(), "environment.yaml")
    return run


def log_evaluation(
    output: Path,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Iterable[Path],
    rows: Iterable[DatasetInput] = (),
) -> Run:
    """Log an evaluation outside of a pipeline as a run of its own.

    Parameters
    ----------
    output : Path
        Folder of the MLflow store, unless ``$MLFLOW_TRACKING_URI`` names one.
    name : str
        Of the experiment, that of the library's runs.
    params, metrics, files, rows
        What to log.

    Returns
    -------
    Run
        Finished.
    """
    uri, experiment_id = _open_experiment(output, name)
    created = MlflowClient(uri).create_run(
        experiment_id, run_name="evaluation", tags=code_tags() | {"tclora.kind": "evaluation"}
    )
    run = Run(uri=uri, experiment_id=experiment_id, run_id=created.info.run_id)
    run.client.log_dict(run.run_id, environment(), "environment.yaml")
    log_params(run, params)
    log_metrics(run, metrics)
    for file in files:
        run.client.log_artifact(run.run_id, str(file))
    run.client.log_inputs(run.run_id, datasets=list(rows))
    close_run(run, "FINISHED")
    return run


def _open_experiment(output: Path, name: str) -> tuple[str, str]:
    """Return the store and the id of an experiment, both created where missing."""
    uri = tracking_uri(output)
    # Two first runs at once would both create the tables of a new store.
    output.mkdir(parents=True, exist_ok=True)
    with exclusive(output.absolute() / ".mlflow.lock"):
        return uri, _experiment(MlflowClient(uri), name, output)


def _experiment(client: MlflowClient, name: str, output: Path) -> str:
    """Return the id of an experiment, created or restored where needed."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None
        if tracking_uri(output).startswith("sqlite:"):
            artifacts = (output.absolute() / "mlartifacts").as_uri()
        return str(
            client.create_experiment(name, artifact_location=artifacts, tags=_EXPERIMENT_TAGS)
        )
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _folder_id(output: Path) -> str:
    """Return what a folder of libraries is known by, whichever machine it is mounted on.

    Its path does not do: other machines may have folders of that path and log to the same store.
    """
    file = output / ".place"
    with exclusive(output.absolute() / ".mlflow.lock"):
        if not file.exists():
            write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8").strip()


def _close_abandoned(client: MlflowClient, experiment_id: str, place: str) -> None:
    """Mark runs on this library as KILLED whose process died before it could; its lock is ours."""
    filters = f"attributes.status = 'RUNNING' AND tags.`{_PLACE}` = '{place}'"
    for parent in client.search_runs([experiment_id], filters):
        children = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        for run in [parent, *client.search_runs([experiment_id], children)]:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")


def close_run(run: Run, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED."""
    run.client.set_terminated(run.run_id, status)


def nested_run(parent: Run, name: str, tags: Mapping[str, str]) -> Run:
    """Start a run below another one."""
    created = parent.client.create_run(
        parent.experiment_id, run_name=name, tags={"mlflow.parentRunId": parent.run_id, **tags}
    )
    return parent.model_copy(update={"run_id": created.info.run_id})


def log_metrics(
    run: Run,
    metrics: Mapping[str, float],
    model: str | None = None,
    rows: DatasetInput | None = None,
) -> None:
    """Log final figures; characters MLflow refuses in names become underscores.

    Parameters
    ----------
    run : Run
        Where.
    metrics : mapping
        The figures; those that are not a number are left out.
    model : str, optional
        Id of the logged model that they are of: models can be ranked by them.
    rows : DatasetInput, optional
        What they were measured on; see `tasks.datasets`.
    """
    name, digest = (rows.dataset.name, rows.dataset.digest) if rows else (None, None)
    stamp = int(time.time() * 1000)
    entries = [
        Metric(
            metric_name(key),
            float(value),
            stamp,
            0,
            model_id=model,
            dataset_name=name,
            dataset_digest=digest,
            run_id=run.run_id,
        )
        for key, value in metrics.items()
        if not pd.isna(value)
    ]
    for start in range(0, len(entries), BATCH):
        run.client.log_batch(run.run_id, metrics=entries[start : start + BATCH])


def log_params(run: Run, params: Mapping[str, Any]) -> None:
    """Log parameters, long values shortened."""
    entries = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()]
    for start in range(0, len(entries), 100):
        run.client.log_batch(run.run_id, params=entries[start : start + 100])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def metric_name(name: str) -> str:
    """Return a name with underscores for characters that MLflow refuses."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def announce(stage: str, figures: Mapping[str, Any]) -> None:
    """Write the figures of a stage to the log of the run."""
    listing = ", ".join(
        f"{name.rpartition('/')[2]} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    get_run_logger().info("%s: %s", stage, listing)
