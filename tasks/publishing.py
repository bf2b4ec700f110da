"""Stages that finish a run: the library in its place, its report, everything in MLflow."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import DatasetInput
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks import tracking
from tasks.artifact import Artifact, Artifacts
from tasks.datasets import dataset_of
from tasks.live_runs import log_history
from tasks.logged_models import log_model_files, register_model
from tasks.routed_model import log_routed
from tasks.tracking import Run
from tasks.training import PARENT
from tasks.where import Where
from tclora.config import Config
from tclora.evaluate.tables import ENDS, flat_figures
from tclora.library import published
from tclora.library.identity import LocatedModel, ModelIdentity
from tclora.library.layout import Layout
from tclora.library.manifest import size, write_manifest
from tclora.library.names import JOINT, ROUTED
from tclora.library.records import (
    Clustering,
    Description,
    Factors,
    Merge,
    Routed,
    Storage,
    Training,
)
from tclora.library.staging import publish
from tclora.preflight import Models
from tclora.report import figures, write_report

_RECOVERED = "test"  # the split that recovery is measured on
_TOTALS = {
    *(f"test/{kind}{end}" for kind in ("nll", "accuracy") for end in ENDS),
    *(f"recovery/{group}{end}" for group in ("mean", "worst") for end in ENDS),
    "seeds",
}


@dataclass(frozen=True)
class Parts:
    """What a library is made of."""

    examples: Artifact
    clusters: Artifact
    adapters: Artifacts
    joint: Artifact | None
    planned: Mapping[str, float]
    factors: Artifact
    explained_variance: Artifact
    diagnosis: Artifact
    merges: Artifacts
    routed: Artifact | None
    evaluation: Artifact | None

    @property
    def trained(self) -> Artifacts:
        """All trained adapters."""
        return self.adapters | ({JOINT: self.joint} if self.joint else {})

    @property
    def tables(self) -> list[Artifact]:
        """What belongs to the product beside adapters, merges and the routed library."""
        parts = [
            self.clusters, self.factors, self.explained_variance, self.diagnosis, self.evaluation
        ]  # fmt: skip
        return [part for part in parts if part]

    def product(self) -> Iterator[Path]:
        """Yield every file and folder that belongs to the product."""
        routed = [self.routed] if self.routed else []
        for part in [*self.tables, *self.trained.values(), *self.merges.values(), *routed]:
            yield from part.paths


@task(name="write-library", cache_policy=NO_CACHE)
def write_library(
    config: Config, models: Models, parts: Parts, links: Mapping[str, str], where: Where
) -> Path:
    """Write manifest and report, then let the library take its place as a whole."""
    layout = where.layout
    names = {layout.name(path) for path in parts.product()}
    write_manifest(layout.root, _describe(config, models, parts, links), names)
    write_report(layout.root)
    shutil.rmtree(layout.checkpoints, ignore_errors=True)  # all adapters are finished
    publish(layout.root, config.library_dir)
    return config.library_dir


@task(name="put-library", cache_policy=NO_CACHE)
def put_library(library: Path, url: str) -> str:
    """Put the finished library into a store; return where any machine finds it."""
    place = published.put_library(library, url)
    get_run_logger().info("published: %s", place)
    return place


def _describe(
    config: Config, models: Models, parts: Parts, links: Mapping[str, str]
) -> Description:
    """Say what the library was made of."""
    separate = sum(size(part.path) for part in parts.adapters.values())
    return Description(
        name=config.name,
        config=config.model_dump(mode="json"),
        base_model=LocatedModel(
            id=config.base_model, digest=models.base_digest, location=models.base
        ),
        embedding_model=ModelIdentity(id=config.embed.model, digest=models.embedder_digest),
        profile=parts.examples.metrics,
        clustering=Clustering(**parts.clusters.info),
        training={
            name: Training(**_trained(part), planned_seconds=parts.planned.get(name))
            for name, part in parts.trained.items()
        },
        factors=Factors(**parts.factors.info),
        merges={
            method: Merge(**part.info, bytes=size(part.path))
            for method, part in parts.merges.items()
        },
        routed=Routed(**parts.routed.info) if parts.routed else None,
        storage=Storage(
            separate_adapters=separate,
            factors=size(parts.factors.path),
            routed=size(parts.routed.path) if parts.routed else None,
        ),
        links=dict(links),
    )


def _trained(part: Artifact) -> dict[str, Any]:
    return {name: value for name, value in part.info.items() if name != PARENT}


@task(name="log-library", cache_policy=NO_CACHE)
def log_library(
    run: Run, config: Config, parts: Parts, library: Path, place: str | None = None
) -> None:
    """Log everything of the library to MLflow: files, figures, adapters, rows, nested runs."""
    here = Layout(library)
    if place:
        run.client.set_tag(run.run_id, "tclora.published", place)
    stages = [parts.examples, *parts.tables, *([parts.routed] if parts.routed else [])]
    tracking.log_metrics(run, {name: v for part in stages for name, v in part.metrics.items()})
    _log_files(run, parts, here)
    for name, figure in figures(library).items():
        run.client.log_figure(run.run_id, figure, f"figures/{name}.png")
    examples = pd.read_parquet(here.examples)
    datasets = {
        str(split): dataset_of(
            rows,
            config.data.path,
            f"{config.name}-{split}",
            "training" if split == "train" else "evaluation",
        )
        for split, rows in examples.groupby("split", sort=True)
    }
    run.client.log_inputs(run.run_id, datasets=list(datasets.values()))
    models = {}
    for name, part in parts.trained.items():
        _log_training(run, name, part, here)
        models[name] = _register(run, config, name, here.adapter(name), part)
    for method, part in parts.merges.items():
        models[method] = _register(run, config, f"merged-{method}", here.merged(method), part)
    if parts.routed:
        digest = next(iter(parts.routed.files.values()))
        models[ROUTED] = log_routed(run, here.routed.folder, digest, config)
    if parts.evaluation:
        held_out = {split: rows for split, rows in datasets.items() if split != "train"}
        _log_methods(run, parts.merges, models, held_out, here)


def _log_files(run: Run, parts: Parts, here: Layout) -> None:
    """Log the library's files; adapters, merges and the routed library become logged models."""
    files = [here.manifest, here.report, *(here.path(n) for p in parts.tables for n in p.files)]
    files += [here.training(name) for name in parts.trained]
    files += [here.routing] if parts.routed else []
    for file in files:
        folder = here.name(file).rpartition("/")[0] or None
        run.client.log_artifact(run.run_id, str(file), folder)


def _log_training(run: Run, name: str, part: Artifact, here: Layout) -> None:
    """Give a training that came from the cache its nested run too, with the whole curve."""
    if part.info[PARENT] == run.run_id:
        return
    tags = {"tclora.kind": "train", "tclora.cached_from": part.info[PARENT]}
    nested = tracking.nested_run(run, name, tags)
    history = json.loads(here.training(name).read_text(encoding="utf-8"))
    log_history(nested, history)
    tracking.log_metrics(nested, part.metrics)
    tracking.close_run(nested, "FINISHED")


def _register(run: Run, config: Config, name: str, folder: Path, part: Artifact) -> str:
    """Log an adapter as a logged model, and register the primary merge; return the model's id."""
    digest = next(iter(part.files.values()))
    model_id = log_model_files(run, folder, name, digest, "peft-lora")
    if name == f"merged-{config.merge.primary}":
        register_model(run, model_id, f"{config.name}-{config.merge.primary}")
    return model_id


def _log_methods(
    run: Run,
    merges: Mapping[str, Artifact],
    models: Mapping[str, str],
    datasets: Mapping[str, DatasetInput],
    here: Layout,
) -> None:
    """Log each method's figures to a nested run, and to the logged model where it is one.

    `datasets` are the rows of each split; a figure names those that it was measured on.
    """
    summary = pd.read_parquet(here.evaluation.summary)
    recovered = pd.read_parquet(here.evaluation.recovery)
    totals: dict[str, float] = {}
    for method, rows in summary.groupby("method", sort=False):
        name = str(method)
        metrics = flat_figures(rows) | _shares(recovered[recovered["method"] == method])
        metrics["seeds"] = float(rows["seeds"].max())
        totals |= {f"{name}/{key}": value for key, value in metrics.items() if key in _TOTALS}
        metrics |= merges[name].metrics if name in merges else {}
        nested = tracking.nested_run(run, f"evaluate-{name}", {"tclora.kind": "evaluate"})
        tracking.log_params(nested, {"method": name})
        run.client.log_inputs(nested.run_id, datasets=list(datasets.values()))
        for split, part in _by_split(metrics, datasets):
            tracking.log_metrics(nested, part, models.get(name), datasets.get(split))
        tracking.close_run(nested, "FINISHED")
    tracking.log_metrics(run, totals)


def _by_split(
    metrics: Mapping[str, float], splits: Iterable[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the figures of each split, and under "" those that are of none."""
    parts: dict[str, dict[str, float]] = {split: {} for split in ("", *splits)}
    for key, value in metrics.items():
        group = key.partition("/")[0]
        split = _RECOVERED if group == "recovery" else group
        parts[split if split in parts else ""][key] = value
    yield from parts.items()


def _shares(recovered: pd.DataFrame) -> dict[str, float]:
    """Return one method's recovery per cluster, of the mean and of the worst."""
    columns = dict(zip(ENDS, ("recovery", "low", "high", "n"), strict=True))
    return {
        f"recovery/{row['cluster']}{end}": float(row[column])
        for row in recovered.to_dict("records")
        for end, column in columns.items()
    }
