"""The task that makes the routed library: gates, router, and where held-out prompts go."""

import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file

from tasks.artifact import Artifact, stage
from tclora.activations import ActivationStatistics
from tclora.adapter import read_adapter
from tclora.cluster.embed import Embeddings
from tclora.config import Config
from tclora.files import atomic_path
from tclora.library.manifest import size
from tclora.preflight import Models
from tclora.route import (
    ModelIdentity,
    RoutedInfo,
    Router,
    fit_gates,
    fit_router,
    write_library,
)
from tclora.route.quality import calibration_curve, router_figures, true_clusters
from tclora.route.storage import FOLDER

ROUTED = "routed"  # its name among the methods


def routed_info(config: Config, models: Models, adapters: list[str]) -> RoutedInfo:
    """Say which models a routed library belongs to."""
    return RoutedInfo(
        base_model=ModelIdentity(id=config.base_model, digest=models.base_digest),
        embedding_model=ModelIdentity(id=config.embed.model, digest=models.embedder_digest),
        template=config.train.template,
        max_tokens=config.train.max_tokens,
        method=config.merge.primary,
        clusters=tuple(adapters),
    )


@stage("tclora.route", "tclora.route.quality", name="route")
def route(
    info: RoutedInfo,
    adapters: dict[str, Artifact],
    merged: Artifact,
    statistics: Artifact | None,
    embeddings: Artifact,
    clusters: Artifact,
    router_name: str,
    top_k: int | None,
    coverage: float,
    seed: int,
) -> Artifact:
    """Gate the merge's components per cluster, calibrate the router, route the held-out prompts."""
    root = merged.root
    grams = [statistics.root / name for name in statistics.files] if statistics else []
    gated = fit_gates(
        [read_adapter(part.path, name) for name, part in adapters.items()],
        read_adapter(merged.path, info.method),
        ActivationStatistics.load(*grams) if grams else None,
    )
    rows = pd.read_parquet(clusters.path, columns=["id", "prompt", "task", "split", "cluster"])
    vectors = load_file(embeddings.path)["embeddings"]
    training = (rows["split"] == "train").to_numpy()
    labels = rows.loc[training, "cluster"].to_numpy()
    router = fit_router(
        vectors[training], labels, router=router_name, top_k=top_k, coverage=coverage, seed=seed
    )
    write_library(root / FOLDER, gated, router, info)
    rows["true"] = true_clusters(rows)
    routing = _route_rows(rows[~training], vectors[~training], router, gated.names)
    with atomic_path(root / "routing.parquet") as fresh:
        routing.to_parquet(fresh)
    figures = dict(router_figures(routing)) if len(routing) else {}
    for name, value in figures.items():
        get_run_logger().info("router: %s %.3f", name, value)
    separate = sum(size(part.path) for part in adapters.values())
    figures |= {
        name: value for name, value in router.save().settings.items() if isinstance(value, float)
    }
    share = size(root / FOLDER) / separate
    return Artifact.of(
        root,
        FOLDER,
        "routing.parquet",
        metrics={f"router/{name}": value for name, value in figures.items()}
        | {"router/bytes_share": share},
        info={
            **figures,
            "router": router_name,
            "by_token": "token_temperature" in routing,
            "method": info.method,
            "bytes_share": share,
            "calibration_curve": calibration_curve(routing).to_dict("records"),
        },
    )


def _route_rows(
    rows: pd.DataFrame, vectors: Embeddings, router: Router, names: tuple[str, ...]
) -> pd.DataFrame:
    """Return one row per held-out prompt: its routing, its weights in columns of their own."""
    table = router.route(vectors).table(names)
    return pd.concat([rows.reset_index(drop=True), table], axis=1)
