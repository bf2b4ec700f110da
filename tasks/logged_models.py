"""MLflow: adapters as logged models, and the version that is the current one."""

from pathlib import Path

from mlflow.entities import LoggedModelOutput, LoggedModelStatus

from tasks.tracking import Run


def log_model_files(run: Run, folder: Path, name: str, digest: str, kind: str) -> str:
    """Record a directory as a logged model; equal digests are stored once per experiment.

    Returns
    -------
    str
        The logged model's id.
    """
    model_id = stored_model(run, name, digest)
    if model_id is None:
        model_id = begin_model(run, name, digest, kind)
        store_model(run, folder, model_id)
    record_model(run, model_id)
    return model_id


def stored_model(run: Run, name: str, digest: str) -> str | None:
    """Return the id of the experiment's logged model of a name and digest, if there is one."""
    same = run.client.search_logged_models(
        [run.experiment_id],
        filter_string=f"tags.`tclora.sha256` = '{digest}' AND name = '{name}'",
    )
    # One that is not ready was left by a run that was killed while it uploaded.
    return next((m.model_id for m in same if m.status == LoggedModelStatus.READY), None)


def begin_model(run: Run, name: str, digest: str, kind: str) -> str:
    """Create a logged model that has no files yet, and return its id."""
    model = run.client.create_logged_model(
        run.experiment_id,
        name=name,
        source_run_id=run.run_id,
        tags={"tclora.sha256": digest},
        params={"format": kind},
    )
    return str(model.model_id)


def store_model(run: Run, folder: Path, model_id: str) -> None:
    """Store a directory as the files of a logged model."""
    run.client.log_model_artifacts(model_id, str(folder))
    run.client.finalize_logged_model(model_id, "READY")


def record_model(run: Run, model_id: str) -> None:
    """Say that a logged model is a run's."""
    run.client.log_outputs(run.run_id, [LoggedModelOutput(model_id, step=0)])


def register_model(run: Run, model_id: str, name: str) -> str:
    """Register a logged model under a name, alias "current"; once per logged model.

    Returns
    -------
    str
        The version.
    """
    client = run.client
    # A local store would look a models:/ address up in the process's global store, not in its own.
    remote = run.uri.startswith("http")
    source = (
        f"models:/{model_id}" if remote else client.get_logged_model(model_id).artifact_location
    )
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == source:  # a search leaves model_id empty
            break
    else:
        version = client.create_model_version(
            name, source=source, run_id=run.run_id, model_id=model_id
        )
    client.set_registered_model_alias(name, "current", version.version)
    return str(version.version)
