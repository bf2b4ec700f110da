"""Stages from adapters to merges: statistics, rank, factors, scales, merging, refitting."""

from typing import Any, NamedTuple

from prefect import get_run_logger

from tasks.artifact import Artifact, Artifacts, paths_of
from tasks.keys import stage
from tasks.where import Where
from tclora.activations.clusters import collect_clusters
from tclora.adapter import read_adapter, write_adapter
from tclora.config import SolverConfig
from tclora.files import atomic_path
from tclora.jobs.call import Event
from tclora.library.names import unrefitted_name
from tclora.merge import merge as merge_adapters
from tclora.merge.inputs import MergeInputs
from tclora.model.base import Base
from tclora.model.sample import Sample, Use
from tclora.tensor import LibraryFactors, explained_variance_curve, shared_structure
from tclora.tensor import factorise as factorise_adapters
from tclora.tensor.interference import MEASURES, interference
from tclora.tune.components import refit_components
from tclora.tune.rank import choose_rank
from tclora.tune.scale import choose_scale


class Rows(NamedTuple):
    """The base model and rows of every cluster, for stages that look at its behaviour on them."""

    base: Base
    rows: Artifacts
    per_cluster: int
    token_budget: int
    seed: int

    def sample(self, use: Use) -> Sample:
        """Return the rows for one use."""
        return Sample(
            rows=paths_of(self.rows),
            count=self.per_cluster,
            use=use,
            seed=self.seed,
            token_budget=self.token_budget,
        )


class Given(NamedTuple):
    """What a merge is given, as artifacts; see `MergeInputs`."""

    adapters: Artifacts
    factors: Artifact | None
    statistics: Artifact | None
    rank: int | None
    seed: int

    def inputs(self) -> MergeInputs:
        """Return the files."""
        return MergeInputs(
            adapters=paths_of(self.adapters),
            factors=self.factors.path if self.factors else None,
            statistics=self.statistics.paths if self.statistics else (),
            rank=self.rank,
            seed=self.seed,
        )


@stage("statistics")
def statistics(modules: tuple[str, ...], adapters: Artifacts, rows: Rows, where: Where) -> Artifact:
    """Collect activation statistics of modules on each cluster, for merges that use them.

    They are of the base model, or with each cluster's own adapter where `adapters` are given.
    """
    layout = where.layout
    targets = {name: layout.statistics(name) for name in rows.rows}
    tokens = where.executor.run_isolated(
        collect_clusters,
        base=rows.base,
        sample=rows.sample("statistics"),
        modules=list(modules),
        targets=targets,
        adapters=paths_of(adapters),
    )
    return Artifact.of(layout.root, *targets.values(), info={"tokens": tokens})


@stage("find-rank")
def find_rank(
    given: Given, method: str, solver: SolverConfig, target: float, rows: Rows, where: Where
) -> Artifact:
    """Find the smallest CP rank at which the routed library reaches a recovery."""
    logger, file = get_run_logger(), where.layout.rank

    def on_event(event: Event) -> None:
        logger.info("CP rank %d recovers %.1f %%", event["rank"], 100 * event["recovery"])

    found = where.executor.run_isolated(
        choose_rank,
        base=rows.base,
        sample=rows.sample("rank"),
        given=given.inputs(),
        method=method,
        solver=solver,
        recovery=target,
        target=file,
        on_event=on_event,
    )
    if not found.reached:
        logger.warning(
            "no CP rank reaches factorise.target_recovery %g; the largest, %d, is used",
            target,
            found.rank,
        )
    curve = {f"factors/recovery_R{rank}": share for rank, share in found.curve.items()}
    return Artifact.of(where.layout.root, file, metrics=curve, info={"rank": found.rank})


@stage("factorise")
def factorise(
    adapters: Artifacts, rank: int, solver: SolverConfig, seed: int, where: Where
) -> Artifact:
    """Factorise all cluster adapters jointly at CP rank R."""
    read = [read_adapter(part.path, name) for name, part in adapters.items()]
    factors = factorise_adapters(read, rank, **dict(solver), seed=seed)
    factors.save(where.layout.factors)
    used = max(module.rank for module in factors.modules.values())
    if used < rank:
        get_run_logger().warning(
            "factorise.rank %d exceeds the adapters' total rank; %d, which is exact, is used",
            rank,
            used,
        )
    figures = {"rank": used, "explained_variance": factors.explained_variance}
    return Artifact.of(
        where.layout.root,
        where.layout.factors,
        metrics={f"factors/{name}": value for name, value in figures.items()},
        info=figures,
    )


@stage("explained-variance")
def explained_variance(
    adapters: Artifacts, ranks: tuple[int, ...], seed: int, where: Where
) -> Artifact:
    """Explained variance against rank, per module and overall."""
    read = [read_adapter(part.path, name) for name, part in adapters.items()]
    curve = explained_variance_curve(read, ranks, seed=seed)
    with atomic_path(where.layout.explained_variance) as fresh:
        curve.to_parquet(fresh)
    overall = curve[curve["module"] == "overall"].set_index("rank")["explained_variance"]
    metrics = {f"factors/explained_variance_R{rank}": value for rank, value in overall.items()}
    return Artifact.of(where.layout.root, where.layout.explained_variance, metrics=metrics)


@stage("diagnose")
def diagnose(adapters: Artifacts, factors: Artifact, where: Where) -> Artifact:
    """Measure interference between the adapters, and what their joint factors share."""
    layout = where.layout
    read = [read_adapter(part.path, name) for name, part in adapters.items()]
    shared = shared_structure(read, LibraryFactors.load(factors.path))
    measured = interference(read)
    tables = {
        layout.interference: measured.pairs(),
        layout.module_interference: measured.modules,
        layout.shared_structure: shared,
    }
    for file, table in tables.items():
        with atomic_path(file) as fresh:
            table.to_parquet(fresh)
    metrics = {
        f"factors/{name}": float((shared[column] * shared["energy"]).sum() / shared["energy"].sum())
        for name, column in (("shared_energy", "shared"), ("loading_spread", "spread"))
    }
    means = tables[layout.interference][list(MEASURES)].mean()
    metrics |= {f"interference/{name}": float(value) for name, value in means.dropna().items()}
    return Artifact.of(layout.root, *tables, metrics=metrics)


@stage("tune-scale", "tune-{method}")
def tune_scale(
    method: str,
    given: Given,
    scales: tuple[float, ...],
    densities: tuple[float, ...],
    rows: Rows,
    where: Where,
) -> Artifact:
    """Choose a method's scale, and its density where it has one, on rows of every cluster."""
    file = where.layout.scale(method)
    found = where.executor.run_isolated(
        choose_scale,
        name=method,
        base=rows.base,
        sample=rows.sample("scale"),
        given=given.inputs(),
        scales=list(scales),
        densities=list(densities),
        target=file,
    )
    listing = ", ".join(f"{scale:g}" for scale in sorted(found.losses))
    get_run_logger().info("%s: scale %g of %s", method, found.scale, listing)
    metrics = {f"merge/{name}": value for name, value in found.options.items()}
    return Artifact.of(where.layout.root, file, metrics=metrics, info=found.options)


@stage("merge", "merge-{method}")
def merge(
    method: str, given: Given, options: dict[str, Any], unrefitted: bool, where: Where
) -> Artifact:
    """Merge the cluster adapters by one method and write a stock PEFT directory.

    `options` are those that were tuned; an `unrefitted` merge is one to be refitted.
    """
    inputs = given.inputs()
    merged = merge_adapters(
        inputs.read_adapters(),
        method,
        factors=inputs.read_factors(),
        statistics=inputs.read_statistics(),
        rank=inputs.rank,
        seed=inputs.seed,
        **options,
    )
    target = where.layout.merged(unrefitted_name(method) if unrefitted else method)
    write_adapter(merged.adapter, target)
    tuned = (f"{' and '.join(options)} tuned on rows of every cluster",) if options else ()
    figures = {
        "rank": merged.rank,
        "parameters": merged.parameters,
        "truncation_loss": merged.truncation_loss,
    }
    return Artifact.of(
        where.layout.root,
        target,
        metrics={f"merge/{name}": value for name, value in figures.items()},
        info={**figures, "notes": "; ".join(merged.notes + tuned)},
    )


@stage("refit", "refit-{method}")
def refit(method: str, merged: Artifact, steps: int, rows: Rows, where: Where) -> Artifact:
    """Refit the weights of a merge's components by the base model's loss on a few rows.

    What else is known of the merge is no part of the key, and so not of the result: `as_refitted`.
    """

    def on_event(event: Event) -> None:
        note = f"loss {event['loss']:.3f}"
        where.progress.update(method, int(event["step"]), steps, note)

    target = where.layout.merged(method)
    losses = where.executor.run_isolated(
        refit_components,
        name=method,
        base=rows.base,
        sample=rows.sample("refit"),
        adapter=merged.path,
        n_steps=steps,
        target=target,
        on_event=on_event,
    )
    get_run_logger().info(
        "%s: loss on the rows %.3f, %.3f after refitting", method, losses[0], min(losses)
    )
    note = f"component weights refitted in {steps} steps on {rows.per_cluster} rows per cluster"
    return Artifact.of(where.layout.root, target, info={"notes": note, "losses": losses})


def as_refitted(fitted: Artifact, merged: Artifact) -> Artifact:
    """Return a refitted merge with what is known of the merge that it was made of."""
    notes = "; ".join(part for part in (merged.info["notes"], fitted.info["notes"]) if part)
    info = merged.info | fitted.info | {"notes": notes}
    return fitted.model_copy(update={"metrics": merged.metrics, "info": info})
