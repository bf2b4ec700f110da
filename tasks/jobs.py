"""Tasks that run as jobs in their own process: training one adapter, evaluating one method."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from tasks.artifact import Artifact, source_digest, stage
from tasks.data import WORK
from tasks.merging import MERGED
from tasks.progress import current
from tasks.tracking import Run, live_run
from tclora.adapter import read_adapter
from tclora.config import EvaluateConfig, FactoriseConfig, ResourceConfig, TrainConfig
from tclora.files import sha256_json, write_json
from tclora.jobs.devices import job_environment, lease_gpu, parallel_jobs, visible_gpus
from tclora.jobs.run import (
    Base,
    EvaluateJob,
    RankJob,
    RefineJob,
    ScaleJob,
    StatisticsJob,
    TrainJob,
    run_job,
)
from tclora.train import total_steps


@contextmanager
def _environment(resources: ResourceConfig) -> Iterator[dict[str, str]]:
    """Environment of a job: its leased GPU, or its share of the cores."""
    with lease_gpu(visible_gpus()) as gpu:
        if gpu is None:
            yield job_environment(parallel_jobs(resources.jobs))
        else:
            yield {"CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}


@stage(
    "tclora.train",
    "tclora.model.tokens",
    "tclora.model.locate",
    name="train",
    task_run_name="train-{name}",
)
def train(
    name: str,
    rows: Artifact,
    config: TrainConfig,
    base: Base,
    seed: int,
    init_seed: int,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Train one adapter; progress goes to the log and to a nested MLflow run while it works."""
    parent, resources = run
    root = rows.root
    total = total_steps(rows.info["rows"], config)
    key = sha256_json(
        [name, rows.files, config.model_dump(), base.digest, seed, init_seed,
         source_digest("tclora.train"), source_digest("tclora.model.tokens")]
    )  # fmt: skip
    job = TrainJob(
        name=name,
        base=base,
        rows=rows.path,
        target=root / "adapters" / name,
        train=config,
        seed=seed,
        init_seed=init_seed,
        # Named by everything that determines it, so a resume never mixes two configurations.
        checkpoint=root / WORK / "checkpoints" / f"{name}-{key[:16]}",
    )
    with _environment(resources) as env, live_run(parent, name, {"tclora.kind": "train"}) as live:

        def on_event(record: dict[str, float]) -> None:
            live.add(record)
            current().update(name, int(record["step"]) + 1, total, f"loss {record['loss']:.3f}")

        result = run_job(job, env=env, timeout=resources.job_timeout, on_event=on_event)
    history = result.pop("history")
    write_json(root / "training" / f"{name}.json", history)
    get_run_logger().info(
        "%s: loss %.3f after %d steps", name, result["final_loss"], result["steps"]
    )
    return Artifact.of(
        root,
        f"adapters/{name}",
        f"training/{name}.json",
        metrics={f"train/{key}": float(value) for key, value in result.items()},
        info={**result, "rows": rows.info["rows"], "mlflow_parent": parent.run_id},
    )


@stage("tclora.activations.collect", "tclora.model.locate", name="statistics")
def statistics(
    rows: dict[str, Artifact],
    adapters: dict[str, Artifact],
    count: int,
    token_budget: int,
    base: Base,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Collect the base activations on each cluster's first rows, for merges that use them."""
    _, resources = run
    root = next(iter(rows.values())).root
    folder = f"{WORK}/statistics"
    job = StatisticsJob(
        name="statistics",
        base=base,
        rows={name: part.path for name, part in rows.items()},
        target=root / folder,
        token_budget=token_budget,
        count=count,
        # Cluster adapters differ in their numbers alone, so that one speaks for all.
        modules=tuple(read_adapter(next(iter(adapters.values())).path).modules),
    )
    with _environment(resources) as env:
        result = run_job(job, env=env, timeout=resources.job_timeout)
    return Artifact.of(root, *(f"{folder}/{name}.safetensors" for name in rows), info=result)


@stage("tclora.merge", "tclora.model.locate", name="tune-scale", task_run_name="tune-{method}")
def tune_scale(
    method: str,
    rows: dict[str, Artifact],
    adapters: dict[str, Artifact],
    factors: Artifact | None,
    activations: Artifact | None,
    count: int,
    scales: tuple[float, ...],
    rank: int | None,
    token_budget: int,
    base: Base,
    seed: int,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Choose a method's scale on each cluster's first rows."""
    _, resources = run
    root = next(iter(rows.values())).root
    name = f"{WORK}/scales/{method}.json"
    job = ScaleJob(
        name=f"tune-{method}",
        base=base,
        rows={cluster: part.path for cluster, part in rows.items()},
        target=root / name,
        token_budget=token_budget,
        count=count,
        adapters={cluster: part.path for cluster, part in adapters.items()},
        statistics=_paths(activations),
        factors=factors.path if factors else None,
        method=method,
        scales=scales,
        rank=rank,
        seed=seed,
    )
    with _environment(resources) as env:
        found = run_job(job, env=env, timeout=resources.job_timeout)
    get_run_logger().info(
        "%s: scale %g of %s", method, found["scale"], ", ".join(f"{s:g}" for s in scales)
    )
    return Artifact.of(root, name, metrics={"merge/scale": found["scale"]}, info=found)


@stage("tclora.merge", "tclora.model.locate", name="refine", task_run_name="refine-{method}")
def refine(
    method: str,
    merged: Artifact,
    rows: dict[str, Artifact],
    count: int,
    steps: int,
    token_budget: int,
    base: Base,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Refit the weights of a merge's components by the base model's loss on a few rows."""
    _, resources = run
    root = merged.root
    name = f"{MERGED}/{method}"
    job = RefineJob(
        name=f"refine-{method}",
        base=base,
        rows={cluster: part.path for cluster, part in rows.items()},
        target=root / name,
        token_budget=token_budget,
        count=count,
        adapter=merged.path,
        steps=steps,
    )

    def on_event(event: dict[str, float]) -> None:
        current().update(method, int(event["step"]), steps, f"loss {event['loss']:.3f}")

    with _environment(resources) as env:
        losses = run_job(job, env=env, timeout=resources.job_timeout, on_event=on_event)["losses"]
    get_run_logger().info(
        "%s: loss on the calibration rows %.3f, %.3f after refitting",
        method,
        losses[0],
        min(losses),
    )
    note = f"component weights refitted in {steps} steps on {count} rows per cluster"
    notes = "; ".join(part for part in (merged.info["notes"], note) if part)
    info = merged.info | {"notes": notes, "losses": losses}
    return Artifact.of(root, name, metrics=merged.metrics, info=info)


def _paths(artifact: Artifact | None) -> tuple[Path, ...]:
    return tuple(artifact.root / name for name in artifact.files) if artifact else ()


@stage("tclora.route", "tclora.tune.rank", "tclora.model.locate", name="find-rank")
def find_rank(
    rows: dict[str, Artifact],
    adapters: dict[str, Artifact],
    activations: Artifact | None,
    method: str,
    config: FactoriseConfig,
    token_budget: int,
    base: Base,
    seed: int,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Find the smallest CP rank at which the routed library reaches a recovery."""
    _, resources = run
    root = next(iter(rows.values())).root
    name = f"{WORK}/rank.json"
    job = RankJob(
        name="rank",
        base=base,
        rows={cluster: part.path for cluster, part in rows.items()},
        target=root / name,
        token_budget=token_budget,
        count=config.recovery_rows,
        adapters={cluster: part.path for cluster, part in adapters.items()},
        statistics=_paths(activations),
        method=method,
        recovery=config.target_recovery or 1.0,
        factorise=config,
        seed=seed,
    )
    logger = get_run_logger()

    def on_event(event: dict[str, Any]) -> None:
        logger.info("CP rank %d recovers %.1f %%", event["rank"], 100 * event["recovery"])

    with _environment(resources) as env:
        found = run_job(job, env=env, timeout=resources.job_timeout, on_event=on_event)
    if not found["reached"]:
        logger.warning(
            "no CP rank reaches factorise.target_recovery %g; the largest, %d, is used",
            config.target_recovery,
            found["rank"],
        )
    curve = {f"factors/recovery_R{rank}": share for rank, share in found["curve"].items()}
    return Artifact.of(root, name, metrics=curve, info=found)


@stage(
    "tclora.evaluate",
    "tclora.evaluate.lm_eval",
    "tclora.model.locate",
    name="evaluate",
    task_run_name="evaluate-{name}",
)
def evaluate(
    name: str,
    rows: Artifact,
    adapters: dict[str, Artifact],
    config: EvaluateConfig,
    base: Base,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Measure one method on the held-out rows.

    `adapters` maps "all", or a cluster's number, to an adapter; it is empty for the base model.
    """
    return _evaluate(name, rows, config, base, run, adapters=adapters)


@stage(
    "tclora.evaluate",
    "tclora.route",
    "tclora.model.locate",
    name="evaluate-routed",
    task_run_name="evaluate-{name}",
)
def evaluate_routed(
    name: str,
    rows: Artifact,
    routed: Artifact,
    config: EvaluateConfig,
    base: Base,
    run: tuple[Run, ResourceConfig],
) -> Artifact:
    """Measure the routed library on the held-out rows, each prompt by its own route."""
    return _evaluate(name, rows, config, base, run, routed=routed)


def _evaluate(
    name: str,
    rows: Artifact,
    config: EvaluateConfig,
    base: Base,
    run: tuple[Run, ResourceConfig],
    *,
    adapters: Mapping[str, Artifact] | None = None,
    routed: Artifact | None = None,
) -> Artifact:
    _, resources = run
    target = rows.root / WORK / "items" / f"{name}.parquet"
    # A method that is a different adapter per row is no model lm-eval could be given.
    harness = config.harness and not routed and set(adapters or {}) <= {"all"}
    folder, routing = [rows.root / file for file in routed.files] if routed else (None, None)
    job = EvaluateJob(
        name=name,
        base=base,
        rows=rows.path,
        target=target,
        evaluate=config,
        adapters={key: artifact.path for key, artifact in (adapters or {}).items()},
        harness_target=target.with_suffix(".harness.parquet") if harness else None,
        routed=folder,
        routing=routing,
    )

    def on_event(event: dict[str, Any]) -> None:
        current().update(name, event["rows"], event["of"], "rows")

    with _environment(resources) as env:
        run_job(job, env=env, timeout=resources.job_timeout, on_event=on_event)
    names = [f"{WORK}/items/{name}.parquet"]
    names += [f"{WORK}/items/{name}.harness.parquet"] if harness else []
    return Artifact.of(rows.root, *names)
