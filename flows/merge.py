"""From adapters to merges: statistics, CP rank, joint factors, scales, merges, routed library."""

from typing import Any

from prefect import flow

from flows.context import Context, Merged, Prepared, Trained
from flows.parallel import collect, parallel_flow
from tasks.artifact import Artifact, Artifacts
from tasks.merging import (
    Given,
    as_refitted,
    diagnose,
    explained_variance,
    factorise,
    find_rank,
    refit,
    tune_scale,
)
from tasks.merging import merge as merge_stage
from tasks.merging import statistics as statistics_stage
from tasks.routing import Rules, Texts, calibrate, route
from tasks.tracking import announce
from tclora.adapter import read_adapter
from tclora.config import GateConfig, RouterConfig, SolverConfig
from tclora.library.names import unrefitted_name
from tclora.merge import methods
from tclora.route import ModelIdentity, RoutedInfo
from tclora.tune.scale import is_scaled


@flow(name="merge-library", validate_parameters=False)
def merge(context: Context, prepared: Prepared, trained: Trained) -> Merged:
    """Factorise the adapters jointly, merge them by every method, make the routed library."""
    cfg, where = context.config, context.where
    # Loss curves hold times, so a repeated training has other ones; its adapter is the same.
    adapters = {name: part.alone() for name, part in trained.adapters.items()}
    informed = {method.name for method in methods() if method.needs} & set(cfg.merge.methods)
    seen = bool(informed) or cfg.route.enabled
    statistics = _statistics(context, prepared, adapters) if seen else None
    rank = _rank(context, prepared, Given(adapters, None, statistics, None, cfg.of_training))
    solver = cfg.factorise.only(SolverConfig)
    factors = factorise(adapters, rank, solver, cfg.of_training, where)
    variance = explained_variance(adapters, cfg.factorise.ranks, cfg.of_training, where)
    diagnosis = diagnose(adapters, factors, where)
    announce("factorise", factors.metrics | diagnosis.metrics)
    blind = Given(adapters, None, None, None, cfg.of_training)
    full = Given(adapters, factors, statistics, rank, cfg.of_training)
    given = {name: full if name in informed else blind for name in cfg.merge.methods}
    scales = _scales(context, prepared, given)
    merges: dict[str, Artifact] = {}
    for name in given:
        merges |= _merge(context, prepared, name, given[name], scales.get(name, {}))
    routed = None
    if cfg.route.enabled:
        seeing = Given(adapters, None, statistics, None, cfg.of_training)
        routed = _route(context, prepared, merges[cfg.merge.primary], seeing)
    return Merged(factors, variance, diagnosis, merges, routed)


def _route(context: Context, prepared: Prepared, merged: Artifact, given: Given) -> Artifact:
    """Gate the primary merge; fallback and abstention are calibrated unless all are configured."""
    cfg, models, where = context.config.route, context.models, context.where
    texts = Texts(prepared.embeddings, prepared.clusters, models.embedder, models.embedder_digest)
    gates = cfg.only(GateConfig)
    calibrated = None
    open_values = [value for value in dict(gates).values() if value is None]
    if open_values and cfg.calibration_rows and len(given.adapters) > 1:
        rows = context.rows(prepared.rows, cfg.calibration_rows)
        calibrated = calibrate(merged, given, texts, rows, gates, where)
    rules = Rules.of(gates, calibrated, cfg.static_share)
    info = _routed_info(context, list(given.adapters))
    return route(info, merged, given, texts, cfg.only(RouterConfig), rules, where)


def _statistics(context: Context, prepared: Prepared, adapters: Artifacts) -> Artifact | None:
    """Collect activation statistics, unless the configuration forgoes them."""
    cfg = context.config.merge
    if not cfg.sample_rows:
        return None
    rows = context.rows(prepared.rows, cfg.sample_rows)
    # Cluster adapters differ in their numbers alone, so that one speaks for all.
    modules = tuple(read_adapter(next(iter(adapters.values())).path).modules)
    own = adapters if cfg.activations == "own" else {}
    return statistics_stage(modules, own, rows, context.where)


def _rank(context: Context, prepared: Prepared, given: Given) -> int:
    """Return the configured CP rank, or the smallest that reaches the wanted recovery."""
    cfg = context.config.factorise
    if cfg.target_recovery is None:
        return cfg.rank
    rows = context.rows(prepared.rows, cfg.recovery_rows)
    primary, solver = context.config.merge.primary, cfg.only(SolverConfig)
    found = find_rank(given, primary, solver, cfg.target_recovery, rows, context.where)
    return int(found.info["rank"])


def _scales(
    context: Context, prepared: Prepared, given: dict[str, Given]
) -> dict[str, dict[str, Any]]:
    """Choose scale and density of every method that has one, where the configuration asks for it.

    Returns the options chosen, per method.
    """
    scaled = [name for name in given if context.config.merge.scales and is_scaled(name)]
    return _tune_scales(context, prepared, {name: given[name] for name in scaled}) if scaled else {}


@parallel_flow("tune-scales")
def _tune_scales(
    context: Context, prepared: Prepared, scaled: dict[str, Given]
) -> dict[str, dict[str, Any]]:
    """Choose scale and density of methods in parallel jobs."""
    cfg = context.config.merge
    where = context.where.shared_by(len(scaled))
    rows = context.rows(prepared.rows, cfg.sample_rows)
    futures = {
        name: tune_scale.submit(name, given, cfg.scales, cfg.densities, rows, where)
        for name, given in scaled.items()
    }
    found = collect("tune-scale", futures, context)
    return {name: dict(part.info) for name, part in found.items()}


def _merge(
    context: Context, prepared: Prepared, method: str, given: Given, options: dict[str, Any]
) -> Artifacts:
    """Merge by one method; refitted if asked for, and then as it was before too."""
    cfg, where = context.config.merge, context.where
    refitted = method in cfg.refitted
    merged = merge_stage(method, given, options, refitted, where)
    if not refitted:
        return {method: merged}
    with where.progress.shown():
        rows = context.rows(prepared.rows, cfg.sample_rows)
        fitted = refit(method, merged, cfg.refit_steps, rows, where)
    return {method: as_refitted(fitted, merged), unrefitted_name(method): merged}


def _routed_info(context: Context, adapters: list[str]) -> RoutedInfo:
    """Say which models the routed library belongs to."""
    cfg, models = context.config, context.models
    return RoutedInfo(
        base_model=ModelIdentity(id=cfg.base_model, digest=models.base_digest),
        embedding_model=ModelIdentity(id=cfg.embed.model, digest=models.embedder_digest),
        template=cfg.train.template,
        max_tokens=cfg.train.max_tokens,
        method=cfg.merge.primary,
        clusters=tuple(adapters),
    )
