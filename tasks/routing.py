"""Stages of the routed library: its calibration by loss, then gates and router."""

from dataclasses import asdict
from typing import NamedTuple

import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file

from tasks.artifact import Artifact
from tasks.keys import stage
from tasks.merging import Given, Rows
from tasks.where import Where
from tclora.adapter import read_adapter
from tclora.config import GateConfig, RouterConfig
from tclora.files import atomic_path
from tclora.jobs.call import Event
from tclora.library.manifest import size
from tclora.model.place import ModelPlace
from tclora.route import Abstention, Fallback, RoutedInfo, fit_gates, fit_router, write_library
from tclora.route.quality import calibration_curve, router_figures, true_clusters
from tclora.tune.routing import ClusteredTexts, calibrate_routing

_COLUMNS = ["id", "prompt", "task", "split", "cluster"]
_FALLBACK, _ABSTENTION = ("spread", "scale"), ("at", "width")
_LOSSES = ("probes_loss", "probes_never", "probes_always")


class Texts(NamedTuple):
    """The clustered prompts, as artifacts; see `ClusteredTexts`."""

    embeddings: Artifact
    clusters: Artifact
    embedder: str
    embedder_digest: str


class Rules(NamedTuple):
    """What prompts far from every cluster get."""

    fallback: Fallback
    abstention: Abstention
    static_share: float
    losses: dict[str, float]  # of the probes abstention was chosen on; empty without

    @classmethod
    def of(cls, config: GateConfig, calibrated: Artifact | None, static_share: float) -> "Rules":
        """Return what the configuration says, else what was calibrated, else the defaults."""
        found = dict(calibrated.info) if calibrated else {}
        losses = {name: found[name] for name in _LOSSES if name in found}
        found |= {name: value for name, value in dict(config).items() if value is not None}
        fallback = {n: found[f"fallback_{n}"] for n in _FALLBACK if f"fallback_{n}" in found}
        abstention = {n: found[f"abstain_{n}"] for n in _ABSTENTION if f"abstain_{n}" in found}
        return cls(Fallback(**fallback), Abstention(**abstention), static_share, losses)

    @property
    def figures(self) -> dict[str, float]:
        """The rules as flat numbers, named as in the configuration."""
        rules = _flat("fallback", self.fallback) | _flat("abstain", self.abstention)
        return rules | {"static_share": self.static_share} | self.losses


@stage("calibrate-routing")
def calibrate(
    merged: Artifact,
    given: Given,
    texts: Texts,
    rows: Rows,
    configured: GateConfig,
    where: Where,
) -> Artifact:
    """Choose fallback gate and abstention by the base model's loss on rows of every cluster.

    Values that are configured are taken as they are, and the others chosen beside them.
    """
    logger, file = get_run_logger(), where.layout.routing_calibration

    def on_event(event: Event) -> None:
        logger.info("fallback of %s", ", ".join(f"{k} {v:.3g}" for k, v in event.items()))

    found = where.executor.run_isolated(
        calibrate_routing,
        base=rows.base,
        sample=rows.sample("route"),
        given=given.inputs(),
        merged=merged.path,
        texts=ClusteredTexts(
            embeddings=texts.embeddings.path,
            clusters=texts.clusters.path,
            embedder=ModelPlace(location=texts.embedder, digest=texts.embedder_digest),
        ),
        configured=configured,
        target=file,
        on_event=on_event,
    )
    info, metrics = _flat("fallback", found.fallback.rule), {}
    if searched := found.abstention:
        losses = dict(zip(_LOSSES, (searched.loss, searched.never, searched.always), strict=True))
        metrics = {f"router/{name}": value for name, value in losses.items()}
        info |= _flat("abstain", searched.rule) | losses
    return Artifact.of(where.layout.root, file, metrics=metrics, info=info)


def _flat(name: str, rule: Fallback | Abstention) -> dict[str, float]:
    """Return the values of a rule, named as in the configuration."""
    return {f"{name}_{field}": value for field, value in asdict(rule).items()}


@stage("route")
def route(
    info: RoutedInfo,
    merged: Artifact,
    given: Given,
    texts: Texts,
    config: RouterConfig,
    rules: Rules,
    where: Where,
) -> Artifact:
    """Gate the merge's components per cluster, calibrate the router, route the held-out prompts."""
    inputs, layout = given.inputs(), where.layout
    gated = fit_gates(
        inputs.read_adapters(),
        read_adapter(merged.path, info.method),
        inputs.read_statistics(),
        fallback=rules.fallback,
    ).blended(rules.static_share)
    rows = pd.read_parquet(texts.clusters.path, columns=_COLUMNS)
    vectors = load_file(texts.embeddings.path)["embeddings"]
    training = (rows["split"] == "train").to_numpy()
    labels = rows.loc[training, "cluster"].to_numpy()
    options = {**dict(config), "abstention": rules.abstention, "seed": inputs.seed}
    router = fit_router(vectors[training], labels, **options)
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
    figures |= rules.figures
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
