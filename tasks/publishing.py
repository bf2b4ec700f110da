"""Tasks that finish a run: figures with intervals, the manifest, the report, MLflow."""

import json
import shutil
from collections.abc import Mapping
from typing import Any

import pandas as pd
from prefect import task
from prefect.artifacts import create_link_artifact

from tasks import tracking
from tasks.artifact import Artifact, stage
from tasks.data import WORK
from tasks.routed_model import log_routed
from tasks.routing import ROUTED
from tasks.tracking import Run
from tclora.config import Config, EvaluateConfig
from tclora.evaluate.recovery import recovery, summarise
from tclora.files import atomic_path
from tclora.library.manifest import prune, size, write_manifest
from tclora.preflight import Models
from tclora.report import figures, write_report
from tclora.route.storage import FOLDER

_FOLDERS = ("adapters", "training", "merged", "evaluation")


@stage("tclora.evaluate.recovery", name="summarise")
def summarise_items(items: dict[str, Artifact], config: EvaluateConfig, seed: int) -> Artifact:
    """Collect the measured items of all methods; summaries and recovery with intervals."""
    root = next(iter(items.values())).root
    table = pd.concat([pd.read_parquet(item.path) for item in items.values()], ignore_index=True)
    options = {"confidence": config.confidence, "resamples": config.resamples, "seed": seed}
    tables = {
        "items": table,
        "summary": summarise(table, **options),
        "recovery": recovery(table, **options),
    }
    harness = [item.root / name for item in items.values() for name in list(item.files)[1:]]
    if harness:
        tables["harness"] = pd.concat(map(pd.read_parquet, harness), ignore_index=True)
    for name, frame in tables.items():
        with atomic_path(root / "evaluation" / f"{name}.parquet") as fresh:
            frame.to_parquet(fresh)
    return Artifact.of(root, *(f"evaluation/{name}.parquet" for name in tables))


@task(name="publish")
def publish(
    config: Config,
    models: Models,
    parts: Mapping[str, Artifact],
    merged: Mapping[str, Artifact],
    trained: Mapping[str, Artifact],
    links: Mapping[str, str],
) -> Artifact:
    """Write manifest and report; remove what an earlier run left behind.

    `parts` holds the stages' single artifacts by name: examples, clusters, factors,
    explained_variance and, where there are any, routed and evaluation.
    """
    root = parts["clusters"].root
    everything = [parts[name] for name in parts if name != "examples"]
    everything += [*merged.values(), *trained.values()]
    files = {name: digest for part in everything for name, digest in part.files.items()}
    prune(root, (".", *_FOLDERS), files)
    separate = [part.path for name, part in trained.items() if name.startswith("cluster-")]
    storage = {"separate adapters": sum(size(path) for path in separate)}
    storage["factors"] = size(parts["factors"].path)
    if ROUTED in parts:
        storage[ROUTED] = size(parts[ROUTED].path)
    storage |= {f"merged {method}": size(part.path) for method, part in merged.items()}
    hidden = {"history", "mlflow_parent"}
    values: dict[str, Any] = {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "base_model": {
            "id": config.base_model, "location": models.base, "digest": models.base_digest,
        },
        "embedding_model": {"id": config.embed.model, "digest": models.embedder_digest},
        "profile": parts["examples"].metrics,
        "clustering": parts["clusters"].info,
        "training": {
            name: {key: value for key, value in part.info.items() if key not in hidden}
            | {"status": "done", "error": None}
            for name, part in trained.items()
        },
        "factors": parts["factors"].info,
        "merges": {
            method: part.info | {"bytes": size(part.path)} for method, part in merged.items()
        },
        "routed": parts[ROUTED].info if ROUTED in parts else None,
        "storage": storage,
        "links": dict(links),
    }  # fmt: skip
    write_manifest(root, values, files)
    write_report(root)
    shutil.rmtree(root / WORK / "checkpoints", ignore_errors=True)  # all adapters are finished
    return Artifact.of(root, "library.json", "report.html", info={"storage": storage})


@task(name="log-library")
def log_library(
    run: Run,
    config: Config,
    parts: Mapping[str, Artifact],
    merged: Mapping[str, Artifact],
    trained: Mapping[str, Artifact],
) -> None:
    """Log everything of the library to MLflow: files, figures, adapters, rows, nested runs."""
    client, root = run.client, parts["clusters"].root
    for part in parts.values():
        tracking.log_metrics(run, part.metrics)
    for name in ("library.json", "report.html", *_files(parts, merged, trained)):
        client.log_artifact(run.run_id, str(root / name), _folder(name))
    for name, figure in figures(root).items():
        client.log_figure(run.run_id, figure, f"figures/{name}.png")
    examples = pd.read_parquet(parts["examples"].path)
    for split, rows in examples.groupby("split", sort=True):
        context = "training" if split == "train" else "evaluation"
        tracking.log_dataset(run, rows, config.data.path, f"{config.name}-{split}", context)
    for name, part in trained.items():
        _log_training(run, name, part)
        _register(run, config, name, part)
    for method, part in merged.items():
        _register(run, config, f"merged-{method}", part)
    if ROUTED in parts:
        log_routed(run, parts[ROUTED], config)
    if "evaluation" in parts:
        _log_methods(run, parts["evaluation"], merged)


def _files(*groups: Mapping[str, Artifact]) -> list[str]:
    """Files of the library without adapters, which become logged models."""
    names = [name for group in groups for part in group.values() for name in part.files]
    models = ("adapters/", "merged/", "work/")
    return [name for name in names if name != FOLDER and not name.startswith(models)]


def _folder(name: str) -> str | None:
    return name.rpartition("/")[0] or None


def _log_training(run: Run, name: str, part: Artifact) -> None:
    """Give a training that came from the cache its nested run too, with the whole curve."""
    if part.info["mlflow_parent"] == run.run_id:
        return
    tags = {"tclora.kind": "train", "tclora.cached_from": part.info["mlflow_parent"]}
    nested = tracking.nested_run(run, name, tags)
    history = json.loads((part.root / "training" / f"{name}.json").read_text(encoding="utf-8"))
    tracking.log_history(nested, history)
    tracking.log_metrics(nested, part.metrics)
    tracking.close_run(nested, "FINISHED")


def _register(run: Run, config: Config, name: str, part: Artifact) -> None:
    digest = next(iter(part.files.values()))
    model_id = tracking.log_model_files(run, part.path, name, digest, "peft-lora")
    if name == f"merged-{config.merge.primary}":
        tracking.register_model(run, model_id, f"{config.name}-{config.merge.primary}")


def _log_methods(run: Run, evaluation: Artifact, merged: Mapping[str, Artifact]) -> None:
    summary = pd.read_parquet(evaluation.root / "evaluation" / "summary.parquet")
    recovered = pd.read_parquet(evaluation.root / "evaluation" / "recovery.parquet")
    for method, rows in summary.groupby("method", sort=False):
        nested = tracking.nested_run(run, f"evaluate-{method}", {"tclora.kind": "evaluate"})
        metrics = {}
        for row in rows.itertuples():
            label = (
                row.split
                if row.group_kind == "all"
                else f"{row.split}/{row.group_kind}-{row.group}"
            )
            metrics[f"{label}/nll"] = row.nll
            metrics[f"{label}/accuracy"] = row.accuracy
        for row in recovered[recovered["method"] == method].itertuples():
            metrics[f"recovery/{row.cluster}"] = row.recovery
        if method in merged:
            metrics |= merged[str(method)].metrics
        tracking.log_params(nested, {"method": method})
        tracking.log_metrics(nested, metrics)
        tracking.close_run(nested, "FINISHED")
        totals = {name: value for name, value in metrics.items() if name in {
            "test/nll", "test/accuracy", "recovery/mean", "recovery/worst"}}  # fmt: skip
        tracking.log_metrics(run, {f"{method}/{name}": value for name, value in totals.items()})


@task(name="link")
def link(run: Run, config: Config) -> None:
    """Show the MLflow run among Prefect's artifacts."""
    key = "".join(c if c.isalnum() else "-" for c in config.name.lower())
    # A store without a server is looked at with `tclora ui`.
    server = run.uri if run.uri.startswith("http") else "http://127.0.0.1:5000"
    create_link_artifact(
        link=f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}",
        link_text=f"MLflow run {run.run_id}",
        key=f"mlflow-{key}",
    )
