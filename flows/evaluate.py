"""Every method measured on the held-out rows."""

from prefect import flow, get_run_logger

from flows.context import Context, Merged, Prepared, Trained
from flows.parallel import collect, parallel_flow
from tasks.artifact import Artifact, Artifacts
from tasks.evaluation import Measured, cross, measure_routed, summarise_items
from tasks.evaluation import evaluate as evaluate_stage
from tclora.config import EvaluateConfig, IntervalConfig, LmEvalConfig, MeasureConfig
from tclora.evaluate.scorers import LEAVE, check_leave
from tclora.evaluate.subjects import ALL
from tclora.library.names import BASE, JOINT, OWN, ROUTED, cluster_number
from tclora.model.base import read_rows


@flow(name="evaluate-library", validate_parameters=False)
def evaluate(
    context: Context,
    prepared: Prepared,
    trained: Trained,
    merged: Merged,
    replicas: Artifacts,
) -> Artifact | None:
    """Measure base, own adapters, joint, merges and the routed library; None without rows.

    `replicas` maps further training seeds to what their runs have measured.
    """
    if prepared.held_out is None:
        get_run_logger().warning("nothing is held out (data.test_fraction is 0): no evaluation")
        return None
    cfg = context.config.evaluate
    scorers = read_rows(prepared.held_out.path, ["scorer"])["scorer"].unique()
    check_leave(scorers, allowed=cfg.allow_code_execution, remedy=LEAVE)
    items = _measure(context, prepared.held_out, _methods(trained, merged), merged.routed)
    crossed = _cross(context, prepared.held_out, trained) if cfg.cross_rows else None
    measured = Measured(items, replicas, context.config.of_training)
    return summarise_items(
        measured,
        crossed,
        merged.diagnosis,
        cfg.only(IntervalConfig),
        context.config.seed,
        context.where,
    )


def _cross(context: Context, rows: Artifact, trained: Trained) -> Artifact:
    """Measure rows of every cluster under every cluster's adapter."""
    cfg, where = context.config, context.where
    adapters = {name: part.alone() for name, part in trained.adapters.items()}
    measured = cfg.evaluate.only(MeasureConfig)
    with where.progress.shown():
        return cross(
            rows, adapters, cfg.evaluate.cross_rows, cfg.seed, measured, context.base, where
        )


def _methods(trained: Trained, merged: Merged) -> dict[str, Artifacts]:
    """Return the adapters of every method that is measured by adapters."""
    own = {str(cluster_number(name)): part.alone() for name, part in trained.adapters.items()}
    methods: dict[str, Artifacts] = {BASE: {}, OWN: own}
    if trained.joint:
        methods[JOINT] = {ALL: trained.joint.alone()}
    return methods | {name: {ALL: part} for name, part in merged.merges.items()}


def lm_eval_for(adapters: Artifacts, config: EvaluateConfig) -> LmEvalConfig | None:
    """Return which of lm-eval's tasks are run with a method's adapters, if any are."""
    # A method that is a different adapter per row is no model lm-eval could be given.
    asked = bool(config.lm_eval) and set(adapters) <= {ALL}
    return config.only(LmEvalConfig) if asked else None


@parallel_flow("measure-methods")
def _measure(
    context: Context, rows: Artifact, methods: dict[str, Artifacts], routed: Artifact | None
) -> Artifacts:
    """Measure all methods in parallel jobs."""
    cfg, base = context.config.evaluate, context.base
    measured = cfg.only(MeasureConfig)
    where = context.where.shared_by(len(methods) + bool(routed))
    futures = {
        name: evaluate_stage.submit(
            name, rows, adapters, measured, lm_eval_for(adapters, cfg), base, where
        )
        for name, adapters in methods.items()
    }
    if routed:
        futures[ROUTED] = measure_routed.submit(ROUTED, rows, routed, measured, base, where)
    return collect("evaluate", futures, context)
