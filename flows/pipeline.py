"""The main job: a pile of instruction data in, a merged library of clustered adapters out.

Each step is a flow of its own, each of its stages a cached task (see `tasks.keys`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from flows.context import Context, Prepared
from flows.evaluate import evaluate
from flows.merge import merge
from flows.opening import opened
from flows.prepare import prepare
from flows.publish import publish
from flows.train import train
from tasks.artifact import Artifact, Artifacts
from tasks.shared import forget_stages
from tclora.config import Config, load_config
from tclora.library.layout import Layout
from tclora.preflight import Models, check
from tclora.preflight.steps import LAST, step_named
from tclora.registry import load_plugins

NAME = "tc-lora"


@flow(name=NAME, validate_parameters=False)
def pipeline(
    config: dict[str, Any] | str, overrides: Sequence[str] = (), until: str = LAST
) -> dict[str, str]:
    """Run the whole TC-LoRA pipeline.

    Parameters
    ----------
    config : dict or str
        A configuration as ``tclora config`` prints it, missing keys at their defaults; or the path
        of a YAML file.
    overrides : sequence of str
        Such as "train.epochs=1".
    until : str
        Last step: prepare, train, merge, evaluate or publish. A run that stops earlier leaves the
        finished library as it is, and those of further training seeds.

    Returns
    -------
    dict of str to str
        Last step, folder of the library or of what there is of it, MLflow run and store.
    """
    load_plugins()  # a worker of a deployment does not come through the command line
    return run(load_config(config, overrides), step_named(until))


@flow(name=NAME, validate_parameters=False)
def checked_pipeline(
    config: Config, models: Models, until: str = LAST, records: Path | None = None
) -> dict[str, str]:
    """Do what `pipeline` does, with a configuration that has passed `tclora.preflight.check`.

    `records` is the folder of records of what the run shares with others; see `tasks.shared`.
    """
    return _run(config, models, step_named(until), records)


def run(config: Config, last: str) -> dict[str, str]:
    """Check a configuration, then run it up to a step; inside of a flow. See `pipeline`."""
    return _run(config, check(config), last)


def _run(config: Config, models: Models, last: str, records: Path | None = None) -> dict[str, str]:
    with opened(config, models, records) as context:
        library = _run_steps(context, last)
    if last == LAST and records is None:  # those of a study are forgotten when it ends
        forget_stages(config)
    run = context.where.run
    return {
        "until": last,
        "library": str(library),
        "mlflow_run": run.run_id,
        "mlflow_uri": run.uri,
        "mlflow_experiment": run.experiment_id,
    }


def _run_steps(context: Context, last: str, given: Prepared | None = None) -> Path:
    """Run the steps up to the last; return the library's folder, or that of what there is of it."""
    for step in _steps(context, last, given):
        if step == last:
            break
    return context.config.library_dir if last == LAST else context.where.layout.root


def _steps(context: Context, last: str, given: Prepared | None) -> Iterator[str]:
    """Run the steps, and give the name of each when it is done; what is given is prepared."""
    prepared = given or prepare(context)
    yield "prepare"
    trained = train(context, prepared)
    yield "train"
    merged = merge(context, prepared, trained)
    yield "merge"
    replicas = _replicate(context, prepared, last)
    evaluated = evaluate(context, prepared, trained, merged, replicas)
    yield "evaluate"
    publish(context, prepared, trained, merged, evaluated)
    yield "publish"


def _replicate(context: Context, prepared: Prepared, last: str) -> Artifacts:
    """Run every further training seed up to the same last step; return what each has measured."""
    measured: Artifacts = {}
    for config in context.config.replicas():
        with opened(config, context.models, context.records, context.where.executor) as replica:
            root = _run_steps(replica, last, prepared.linked(replica.where.layout.root))
        items = Layout(root).evaluation.items
        if items.exists():  # else nothing is held out
            measured[str(config.of_training)] = Artifact.of(root, items)
    return measured
