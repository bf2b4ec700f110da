"""The stage that makes the routed library: gates, router, and where held-out prompts go."""

import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file

from tasks.artifact import Artifact
from tasks.keys import stage
from tasks.merging import Given
from tasks.where import Where
from tclora.adapter import read_adapter
from tclora.config import RouterConfig
from tclora.files import atomic_path
from tclora.library.manifest import size
from tclora.route import RoutedInfo, fit_gates, fit_router, write_library
from tclora.route.quality import calibration_curve, router_figures, true_clusters

_COLUMNS = ["id", "prompt", "task", "split", "cluster"]


@stage("route")
def route(
    info: RoutedInfo,
    merged: Artifact,
    given: Given,
    embeddings: Artifact,
    clusters: Artifact,
    config: RouterConfig,
    where: Where,
) -> Artifact:
    """Gate the merge's components per cluster, calibrate the router, route the held-out prompts."""
    inputs, layout = given.inputs(), where.layout
    gated = fit_gates(
        inputs.read_adapters(), read_adapter(merged.path, info.method), inputs.read_statistics()
    )
    rows = pd.read_parquet(clusters.path, columns=_COLUMNS)
    vectors = load_file(embeddings.path)["embeddings"]
    training = (rows["split"] == "train").to_numpy()
    labels = rows.loc[training, "cluster"].to_numpy()
    router = fit_router(vectors[training], labels, **dict(config), seed=inputs.seed)
    write_library(layout.routed.folder, gated, router, info)
    held_out = rows.assign(true=true_clusters(rows))[~training].reset_index(drop=True)
    table = router.route(vectors[~training]).table(gated.names)
    routing = pd.concat([held_out, table], axis=1)
    with atomic_path(layout.routing) as fresh:
        routing.to_parquet(fresh)
    figures = dict(router_figures(routing)) if len(routing) else {}
    for name, value in figures.items():
        get_run_logger().info("router: %s %.3f", name, value)
    if (temperature := router.save().settings.get("temperature")) is not None:
        figures["temperature"] = float(temperature)
    separate = sum(size(path) for path in inputs.adapters.values())
    figures["bytes_share"] = size(layout.routed.folder) / separate
    return Artifact.of(
        layout.root,
        layout.routed.folder,
        layout.routing,
        metrics={f"router/{name}": value for name, value in figures.items()},
        info={
            **figures,
            "router": config.router,
            "by_token": "token_temperature" in routing,
            "method": info.method,
            "calibration_curve": calibration_curve(routing).to_dict("records"),
        },
    )
