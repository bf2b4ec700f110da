"""The stage that makes the routed library: gates, router, and where held-out prompts go."""

import numpy as np
import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file

from tasks.artifact import Artifact
from tasks.keys import stage
from tasks.merging import Given
from tasks.where import Where
from tclora.adapter import read_adapter
from tclora.cluster.embed import Embeddings
from tclora.config import RouterConfig
from tclora.files import atomic_path
from tclora.library.manifest import size
from tclora.route import RoutedInfo, Router, fit_gates, fit_router, write_library
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
    rows["true"] = true_clusters(rows)
    routing = _route_rows(rows[~training], vectors[~training], router, gated.names)
    with atomic_path(layout.routing) as fresh:
        routing.to_parquet(fresh)
    figures = dict(router_figures(routing)) if len(routing) else {}
    for name, value in figures.items():
        get_run_logger().info("router: %s %.3f", name, value)
    separate = sum(size(path) for path in inputs.adapters.values())
    figures |= {
        "temperature": router.temperature,
        "bytes_share": size(layout.routed.folder) / separate,
    }
    curve = calibration_curve(routing).to_dict("records")
    return Artifact.of(
        layout.root,
        layout.routed.folder,
        layout.routing,
        metrics={f"router/{name}": value for name, value in figures.items()},
        info={**figures, "mode": config.mode, "method": info.method, "calibration_curve": curve},
    )


def _route_rows(
    rows: pd.DataFrame, vectors: Embeddings, router: Router, names: tuple[str, ...]
) -> pd.DataFrame:
    """Return one row per held-out prompt: its routing, its weights in columns of their own."""
    routing = router.route(vectors)
    probabilities = router.probabilities(vectors)
    weights = pd.DataFrame(routing.weights, columns=list(names), index=rows.index)
    table = rows.assign(
        nearest=probabilities.argmax(axis=1),
        known=routing.known,
        similarity=routing.similarity,
        confidence=np.max(probabilities, axis=1, initial=0.0),
    )
    return pd.concat([table, weights], axis=1).reset_index(drop=True)
