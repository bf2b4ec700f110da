"""Stages that measure: one method at a time, in jobs of their own, and the summary of all."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from tasks.artifact import Artifact, Artifacts, paths_of
from tasks.keys import stage
from tasks.where import Where
from tclora.config import IntervalConfig, LmEvalConfig, MeasureConfig
from tclora.evaluate.cross import measure_cross
from tclora.evaluate.harm import foretold, summarise_cross
from tclora.evaluate.method import evaluate_adapters, evaluate_routed
from tclora.evaluate.recovery import recovery, summarise
from tclora.evaluate.winners import winners
from tclora.files import atomic_path
from tclora.jobs.call import Event, EventCallback
from tclora.model.base import Base


@stage("evaluate", "evaluate-{method}")
def evaluate(
    method: str,
    rows: Artifact,
    adapters: Artifacts,
    config: MeasureConfig,
    lm_eval: LmEvalConfig | None,
    base: Base,
    where: Where,
) -> Artifact:
    """Measure one method on the held-out rows.

    `adapters` maps `ALL`, or a cluster's number, to an adapter; it is empty for the base model.
    `lm_eval` is None where none of lm-eval's tasks are asked for.
    """
    layout = where.layout
    where.executor.run_isolated(
        evaluate_adapters,
        name=method,
        base=base,
        rows=rows.path,
        adapters=paths_of(adapters),
        config=config,
        file=layout.items(method),
        lm_eval=lm_eval,
        lm_eval_file=layout.lm_eval(method) if lm_eval else None,
        on_event=_shown(method, where),
    )
    files = [layout.items(method), *([layout.lm_eval(method)] if lm_eval else [])]
    return Artifact.of(layout.root, *files)


@stage("evaluate-routed", "evaluate-{method}")
def measure_routed(
    method: str, rows: Artifact, routed: Artifact, config: MeasureConfig, base: Base, where: Where
) -> Artifact:
    """Measure the routed library on the held-out rows, each prompt by its own route."""
    library, routing = routed.paths
    where.executor.run_isolated(
        evaluate_routed,
        name=method,
        base=base,
        rows=rows.path,
        library=library,
        routing=routing,
        config=config,
        file=where.layout.items(method),
        on_event=_shown(method, where),
    )
    return Artifact.of(where.layout.root, where.layout.items(method))


@stage("cross")
def cross(
    rows: Artifact,
    adapters: Artifacts,
    per_cluster: int,
    seed: int,
    config: MeasureConfig,
    base: Base,
    where: Where,
) -> Artifact:
    """Measure rows of every cluster under every cluster's adapter, alone and added to its own."""
    file = where.layout.items("cross")
    where.executor.run_isolated(
        measure_cross,
        base=base,
        rows=rows.path,
        adapters=paths_of(adapters),
        per_cluster=per_cluster,
        seed=seed,
        config=config,
        file=file,
        on_event=_shown("cross", where),
    )
    return Artifact.of(where.layout.root, file)


@dataclass(frozen=True)
class Measured:
    """The measured items: of every method, and of further training seeds with all their methods."""

    methods: Artifacts
    replicas: Artifacts
    training_seed: int

    def table(self) -> pd.DataFrame:
        """Return all items, with their seeds where there are several."""
        parts = [pd.read_parquet(part.path) for part in self.methods.values()]
        table = pd.concat(parts, ignore_index=True)
        if not self.replicas:
            return table
        others = [pd.read_parquet(p.path).assign(seed=int(s)) for s, p in self.replicas.items()]
        return pd.concat([table.assign(seed=self.training_seed), *others], ignore_index=True)


@stage("summarise")
def summarise_items(
    items: Measured,
    crossed: Artifact | None,
    diagnosis: Artifact,
    config: IntervalConfig,
    seed: int,
    where: Where,
) -> Artifact:
    """Collect the measured items of all methods; summaries, recovery, winners and harm."""
    layout, table = where.layout, items.table()
    options = {**dict(config), "seed": seed}
    tables = {
        "items": table,
        "summary": summarise(table, **options),
        "recovery": recovery(table, **options),
        "winners": winners(table, **options),
    }
    if crossed:
        tables["cross"] = summarise_cross(pd.read_parquet(crossed.path), **options)
        tables["harm"] = foretold(tables["cross"], pd.read_parquet(diagnosis.path), **options)
    lm_eval = [path for item in items.methods.values() for path in item.paths[1:]]
    if lm_eval:
        tables["lm_eval"] = pd.concat(map(pd.read_parquet, lm_eval), ignore_index=True)
    for name, frame in tables.items():
        with atomic_path(layout.evaluation.table(name)) as fresh:
            frame.to_parquet(fresh)
    files = [layout.evaluation.table(name) for name in tables]
    return Artifact.of(layout.root, *files, metrics=_harm_metrics(tables) if crossed else {})


def _harm_metrics(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Return the mean harm of an added adapter, and how well each measure foretells it."""
    cross, harm = tables["cross"], tables["harm"].set_index("measure")["rho"].dropna()
    mean = cross[cross["added"]]["change"].mean()
    rho = {f"interference/{name}_harm_rho": float(value) for name, value in harm.items()}
    return ({} if pd.isna(mean) else {"interference/harm": float(mean)}) | rho


def _shown(method: str, where: Where) -> EventCallback:
    def on_event(event: Event) -> None:
        where.progress.update(method, event["rows"], event["of"], "rows")

    return on_event
