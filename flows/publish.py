"""The library as a whole: manifest, report, MLflow."""

from prefect import flow
from prefect.runtime import flow_run

from flows.context import Context, Merged, Prepared, Trained
from tasks.artifact import Artifact
from tasks.publishing import Parts, log_library, put_library, write_library
from tasks.showing import show


@flow(name="publish", validate_parameters=False)
def publish(
    context: Context,
    prepared: Prepared,
    trained: Trained,
    merged: Merged,
    evaluated: Artifact | None,
) -> None:
    """Write manifest and report, put the library in its place, log and show everything."""
    cfg, run = context.config, context.where.run
    parts = Parts(
        examples=prepared.examples,
        clusters=prepared.clusters,
        adapters=trained.adapters,
        joint=trained.joint,
        planned=trained.planned,
        factors=merged.factors,
        explained_variance=merged.explained_variance,
        diagnosis=merged.diagnosis,
        merges=merged.merges,
        routed=merged.routed,
        evaluation=evaluated,
    )
    links = {"mlflow_run": run.run_id, "prefect_flow_run": str(flow_run.parent_flow_run_id or "")}
    library = write_library(cfg, context.models, parts, links, context.where)
    place = put_library(library, cfg.publish_to) if cfg.publish_to else None
    log_library(run, cfg, parts, library, place)
    show(run, cfg, library, place)
