"""The flows of parallel jobs: training every adapter, tuning scales, evaluating every method."""

from collections.abc import Callable, Mapping
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.artifact import Artifact
from tasks.data import JOINT
from tasks.jobs import evaluate, evaluate_routed, train, tune_scale
from tasks.progress import job_progress
from tasks.routing import ROUTED
from tasks.tracking import Run
from tclora.config import Config
from tclora.errors import JobError
from tclora.evaluate.recovery import BASE, OWN
from tclora.jobs.devices import parallel_jobs
from tclora.jobs.run import Base, stopping_jobs
from tclora.preflight import Models

Artifacts = dict[str, Artifact]
# The joint factors, activation statistics and rank that a merge method is given.
MergeInput = tuple[Artifact | None, Artifact | None, int | None]
MergeInputs = dict[str, MergeInput]


def base_of(cfg: Config, models: Models) -> Base:
    """Return the base model as the jobs of a run use it."""
    return Base.of(models.base, models.base_digest, cfg.train)


@flow(name="train-library", validate_parameters=False)
def train_all(cfg: Config, models: Models, rows: Artifacts, run: Run) -> Artifacts:
    """Train the joint adapter and one per cluster, in parallel jobs; the longest starts first."""
    names = sorted(
        (name for name in rows if name != "evaluation"), key=lambda name: -rows[name].info["rows"]
    )
    futures = {}
    for name in names:
        number = names.index(name)
        own_start = number if cfg.train.init == "independent" else 0
        futures[name] = train.submit(
            name,
            rows[name],
            cfg.train.model_copy(update={"joint": False}),  # says nothing about one adapter
            base_of(cfg, models),
            cfg.seed,
            cfg.seed + own_start,
            run=(run, cfg.resources),
        )
    return _collect("train", futures)


@flow(name="tune-scales", validate_parameters=False)
def tune_all(
    cfg: Config,
    models: Models,
    rows: Artifacts,
    adapters: Artifacts,
    inputs: MergeInputs,
    run: Run,
) -> Artifacts:
    """Choose the scale of every method of `inputs` on the calibration rows, in parallel jobs."""
    futures = {
        name: tune_scale.submit(
            name,
            rows,
            adapters,
            factors,
            activations,
            cfg.merge.calibration_rows,
            cfg.merge.scales,
            rank,
            cfg.train.tokens_per_forward,
            base_of(cfg, models),
            cfg.seed,
            run=(run, cfg.resources),
        )
        for name, (factors, activations, rank) in inputs.items()
    }
    return _collect("tune-scale", futures)


@flow(name="evaluate-library", validate_parameters=False)
def evaluate_all(
    cfg: Config,
    models: Models,
    rows: Artifacts,
    trained: Artifacts,
    merged: Artifacts,
    routed: Artifact | None,
    run: Run,
) -> Artifacts:
    """Measure base, own adapters, joint, merges and the routed library, in parallel jobs."""
    own = {name.removeprefix("cluster-"): part for name, part in trained.items() if name != JOINT}
    candidates: dict[str, Artifacts] = {BASE: {}, OWN: own}
    if JOINT in trained:
        candidates[JOINT] = {"all": trained[JOINT]}
    candidates |= {name: {"all": part} for name, part in merged.items()}
    measured = cfg.evaluate.model_copy(update={"confidence": 0.95, "resamples": 1})  # for summaries
    base, where = base_of(cfg, models), (run, cfg.resources)
    futures = {
        name: evaluate.submit(name, rows["evaluation"], adapters, measured, base, run=where)
        for name, adapters in candidates.items()
    }
    if routed:
        futures[ROUTED] = evaluate_routed.submit(
            ROUTED, rows["evaluation"], routed, measured, base, run=where
        )
    return _collect("evaluate", futures)


def in_parallel(cfg: Config, subflow: Any) -> Callable[..., Artifacts]:  # noqa: ANN401
    """Return a subflow that runs as many jobs at once as the machine and configuration allow."""
    jobs = parallel_jobs(cfg.resources.jobs)
    parallel = subflow.with_options(task_runner=ThreadPoolTaskRunner(max_workers=jobs))

    def run_subflow(*arguments: Any) -> Artifacts:  # noqa: ANN401
        with job_progress():
            return parallel(*arguments)

    return run_subflow


def _collect(stage: str, futures: Mapping[str, PrefectFuture[Artifact]]) -> Artifacts:
    """Wait for all jobs; if some failed, name them. What the others made stays in the cache."""
    with stopping_jobs():
        wait(list(futures.values()))
    failed = {name: f.state.message for name, f in futures.items() if not f.state.is_completed()}
    if failed:
        listing = "\n".join(f"  - {name}: {message}" for name, message in failed.items())
        raise JobError(
            f"{len(failed)} of {len(futures)} {stage} jobs failed; the others are kept and a new "
            f"run repeats these only:\n{listing}"
        )
    return {name: future.result() for name, future in futures.items()}
