"""The main job: a pile of instruction data in, a merged library of clustered adapters out.

Every stage is a cached task (see `tasks.artifact`); this file is the table of contents. Training
and evaluation are flows of their own (`flows.parallel`), because they run as parallel jobs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows.parallel import (
    Artifacts,
    MergeInput,
    MergeInputs,
    base_of,
    evaluate_all,
    in_parallel,
    train_all,
    tune_all,
)
from tasks import tracking
from tasks.artifact import Artifact
from tasks.data import JOINT, cluster, divide, embed, read
from tasks.jobs import find_rank, refine, statistics
from tasks.merging import UNREFINED, explained_variance, factorise, merge
from tasks.progress import job_progress
from tasks.publishing import link, log_library, publish, summarise_items
from tasks.routing import ROUTED, route, routed_info
from tasks.tracking import Run
from tclora.config import Config, load_config
from tclora.data.readers import source_digest
from tclora.jobs.devices import exclusive
from tclora.merge import methods
from tclora.model.locate import choose_dtype, default_device
from tclora.preflight import Models, check
from tclora.tune.scale import is_scaled

STAGES = ("read", "embed", "cluster", "train", "factorise", "merge", "evaluate", "report")


@flow(name="tc-lora", validate_parameters=False)
def pipeline(
    config: dict[str, Any] | str, overrides: Sequence[str] = (), until: str = "report"
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
        Last stage to run, one of read, embed, cluster, train, factorise, merge, evaluate, report.

    Returns
    -------
    dict of str to str
        Folder of the library, MLflow run id and store.
    """
    cfg = load_config(config, overrides)
    if until not in STAGES:
        raise ValueError(f"until must be one of {', '.join(STAGES)}, got {until!r}")
    models = check(cfg)
    cfg = _settled(cfg)
    with _sole_use(cfg), _mlflow_run(cfg) as run:
        _stages(cfg, models, run, STAGES.index(until))
    return {
        "until": until,
        "library": str(cfg.library_dir),
        "mlflow_run": run.run_id,
        "mlflow_uri": run.uri,
        "mlflow_experiment": run.experiment_id,
    }


def _stages(cfg: Config, models: Models, run: Run, last: int) -> None:
    root = cfg.library_dir
    examples = read(
        cfg.data, cfg.seed, models.base, cfg.train.max_tokens, source_digest(cfg.data), root
    )
    _announce("read", examples.metrics)
    if last < STAGES.index("embed"):
        return
    embeddings = embed(examples, cfg.embed, models.embedder, models.embedder_digest)
    if last < STAGES.index("cluster"):
        return
    clusters = cluster(examples, embeddings, cfg.cluster, cfg.seed)
    _announce("cluster", clusters.metrics | {"sizes": clusters.info["sizes"]})
    rows = divide(examples, clusters, cfg.train.joint)
    if last < STAGES.index("train"):
        return
    trained = in_parallel(cfg, train_all)(cfg, models, rows, run)
    # Loss curves hold times, so a repeated training has other ones; its adapter is the same.
    weights = {name: part.alone() for name, part in trained.items()}
    adapters = {name: part for name, part in weights.items() if name != JOINT}
    if last < STAGES.index("factorise"):
        return
    informed = {m.name for m in methods() if m.needs} & set(cfg.merge.methods)
    wanted = informed or cfg.route.enabled
    activations = _activations(cfg, models, rows, adapters, run) if wanted else None
    rank = _cp_rank(cfg, models, rows, adapters, activations, run)
    factors = factorise(adapters, rank, cfg.factorise.n_starts, cfg.factorise.n_iter, cfg.seed)
    variance = explained_variance(adapters, cfg.factorise.ranks, cfg.seed)
    _announce("factorise", factors.metrics)
    if last < STAGES.index("merge"):
        return
    inputs = {
        name: (factors, activations, rank) if name in informed else (None, None, None)
        for name in cfg.merge.methods
    }
    scales = _scales(cfg, models, rows, adapters, inputs, run)
    merged = {
        name: merge(name, adapters, *inputs[name], cfg.seed, scales.get(name))
        for name in inputs
        if name != cfg.merge.primary
    }
    name = cfg.merge.primary
    merged[name] = _primary(cfg, models, rows, adapters, inputs[name], scales.get(name), run)
    routed = None
    if cfg.route.enabled:
        primary = merged[cfg.merge.primary]
        routed = _routed(cfg, models, adapters, primary, activations, embeddings, clusters)
    if last < STAGES.index("evaluate"):
        return
    parts = {
        "examples": examples,
        "clusters": clusters,
        "factors": factors,
        "explained_variance": variance,
    } | ({ROUTED: routed} if routed else {})
    if "evaluation" in rows:
        items = in_parallel(cfg, evaluate_all)(cfg, models, rows, weights, merged, routed, run)
        parts["evaluation"] = summarise_items(items, cfg.evaluate, cfg.seed)
    else:
        get_run_logger().warning("nothing is held out (data.test_fraction is 0): no evaluation")
    if last < STAGES.index("report"):
        return
    publish(cfg, models, parts, merged, trained, _links(run))
    log_library(run, cfg, parts, merged, trained)
    link(run, cfg)


def _activations(
    cfg: Config, models: Models, rows: Artifacts, adapters: Artifacts, run: Run
) -> Artifact | None:
    """Collect activation statistics, unless the configuration forgoes them."""
    if not cfg.merge.calibration_rows:
        return None
    return statistics(
        {name: rows[name] for name in adapters},
        adapters,
        cfg.merge.calibration_rows,
        cfg.train.tokens_per_forward,
        base_of(cfg, models),
        run=(run, cfg.resources),
    )


def _cp_rank(
    cfg: Config,
    models: Models,
    rows: Artifacts,
    adapters: Artifacts,
    activations: Artifact | None,
    run: Run,
) -> int:
    """Return the configured CP rank, or the smallest that reaches the wanted recovery."""
    if cfg.factorise.target_recovery is None:
        return cfg.factorise.rank
    found = find_rank(
        {name: rows[name] for name in adapters},
        adapters,
        activations,
        cfg.merge.primary,
        cfg.factorise.model_copy(update={"rank": 1, "ranks": (1,)}),  # say nothing here
        cfg.train.tokens_per_forward,
        base_of(cfg, models),
        cfg.seed,
        run=(run, cfg.resources),
    )
    return int(found.info["rank"])


def _scales(
    cfg: Config, models: Models, rows: Artifacts, adapters: Artifacts, inputs: MergeInputs, run: Run
) -> dict[str, float]:
    """Choose the scale of every method that has one, where the configuration asks for it."""
    scaled = {name: given for name, given in inputs.items() if is_scaled(name)}
    if not (cfg.merge.scales and scaled):
        return {}
    parts = {name: rows[name] for name in adapters}
    found = in_parallel(cfg, tune_all)(cfg, models, parts, adapters, scaled, run)
    return {name: part.info["scale"] for name, part in found.items()}


def _primary(
    cfg: Config,
    models: Models,
    rows: Artifacts,
    adapters: Artifacts,
    given: MergeInput,
    scale: float | None,
    run: Run,
) -> Artifact:
    """Make the primary merge; its component weights are refitted unless told otherwise."""
    name, refined = cfg.merge.primary, cfg.merge.refine_steps and cfg.merge.calibration_rows
    if not refined:
        return merge(name, adapters, *given, cfg.seed, scale)
    with job_progress():
        return refine(
            name,
            merge(name, adapters, *given, cfg.seed, scale, folder=UNREFINED),
            {cluster: rows[cluster] for cluster in adapters},
            cfg.merge.calibration_rows,
            cfg.merge.refine_steps,
            cfg.train.tokens_per_forward,
            base_of(cfg, models),
            run=(run, cfg.resources),
        )


def _routed(
    cfg: Config,
    models: Models,
    adapters: Artifacts,
    primary: Artifact,
    activations: Artifact | None,
    embeddings: Artifact,
    clusters: Artifact,
) -> Artifact:
    """Make the routed library on the factors of the primary merge."""
    return route(
        routed_info(cfg, models, list(adapters)),
        adapters,
        primary,
        activations,
        embeddings,
        clusters,
        cfg.route.router,
        cfg.route.top_k,
        cfg.route.coverage,
        cfg.seed,
    )


def _settled(cfg: Config) -> Config:
    """Write the weights' type in place of "auto", so that unlike machines share no results."""
    dtype = str(choose_dtype(cfg.train.dtype, default_device())).removeprefix("torch.")
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"dtype": dtype})})


@contextmanager
def _sole_use(cfg: Config) -> Iterator[None]:
    """Hold the library's lock: a second run on the same folder waits, then finds all cached."""
    with exclusive(cfg.library_dir.with_name(f".{cfg.name}.lock")) as waited:
        if waited > 1:
            get_run_logger().info("waited %.0f s for another run on %s", waited, cfg.library_dir)
        yield


@contextmanager
def _mlflow_run(cfg: Config) -> Iterator[Run]:
    """Open the parent MLflow run, linked to this flow run; FAILED if the block raises."""
    tags = {
        "prefect.flow_run_id": flow_run.id or "",
        "prefect.flow_run_name": flow_run.name or "",
    }
    url = flow_run.ui_url or ""
    if url.startswith("http"):  # there is no UI to link to without a server of the user's own
        tags["prefect.flow_run_url"] = url
    run = tracking.open_run(cfg, flow_run.name or cfg.name, tags)
    try:
        yield run
    except BaseException as error:
        tracking.close_run(run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracking.close_run(run, "FINISHED")


def _links(run: Run) -> dict[str, str]:
    return {"mlflow_run": run.run_id, "prefect_flow_run": flow_run.id or ""}


def _announce(stage: str, figures: Mapping[str, Any]) -> None:
    listing = ", ".join(
        f"{name.rpartition('/')[2]} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    get_run_logger().info("%s: %s", stage, listing)
