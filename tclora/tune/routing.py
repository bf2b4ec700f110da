"""The job that calibrates a routed library: its fallback gate, and where its router abstains."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file

from tclora.adapter import read_adapter
from tclora.cluster.centroids import NOISE, Labels
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.cluster.vectors import Embeddings
from tclora.config import GateConfig
from tclora.files import write_json
from tclora.jobs.call import EventCallback
from tclora.merge.inputs import MergeInputs
from tclora.model.base import Base, LoadedBase
from tclora.model.place import ModelPlace
from tclora.model.sample import Sample
from tclora.route.equations import Fallback
from tclora.route.gates import GateFit, gate_equations
from tclora.tune.abstention import (
    PLACES,
    WIDTHS,
    AbstentionSearch,
    choose_abstention,
    make_probes,
    measure_probes,
)
from tclora.tune.fallback import SCALES, SPREADS, FallbackSearch, choose_fallback


class ClusteredTexts(BaseModel):
    """The clustered prompts of a run, as files.

    Attributes
    ----------
    embeddings : Path
        Embeddings of all prompts.
    clusters : Path
        Split and cluster of all prompts, in the same order.
    embedder : ModelPlace
        The embedding model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embeddings: Path
    clusters: Path
    embedder: ModelPlace

    def training(self) -> tuple[Embeddings, Labels]:
        """Return the embeddings of the rows that adapters were trained on, and their clusters."""
        rows = pd.read_parquet(self.clusters, columns=["split", "cluster"])
        kept = ((rows["split"] == "train") & (rows["cluster"] != NOISE)).to_numpy()
        return load_file(self.embeddings)["embeddings"][kept], rows["cluster"].to_numpy()[kept]


@dataclass(frozen=True)
class RoutingCalibration:
    """The outcome of a calibration.

    Attributes
    ----------
    fallback : FallbackSearch
        How the gate of rows that belong to no cluster is made; of no losses where all of that is
        configured.
    abstention : AbstentionSearch or None
        Where the router abstains; None where all of that is configured.
    """

    fallback: FallbackSearch
    abstention: AbstentionSearch | None


def calibrate_routing(
    *,
    base: Base,
    sample: Sample,
    given: MergeInputs,
    merged: Path,
    texts: ClusteredTexts,
    configured: GateConfig,
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> RoutingCalibration:
    """Choose fallback gate and abstention on rows of every cluster; the job of a run.

    Parameters
    ----------
    base : Base
        The base model.
    sample : Sample
        The rows.
    given : MergeInputs
        What was merged.
    merged : Path
        PEFT directory of the merge whose components are gated.
    texts : ClusteredTexts
        The clustered prompts.
    configured : GateConfig
        Values that are not searched: the others are chosen beside them.
    target : Path
        JSON file of the outcome, every probe and its losses included.
    on_event : callable
        Called with ``spread``, ``scale`` and ``loss`` of every fallback rule tried.

    Returns
    -------
    RoutingCalibration
    """
    loaded = base.load()
    fit = gate_equations(given.adapters_in_memory(), read_adapter(merged), given.read_statistics())
    fallback = _fallback(loaded, fit, sample, configured, on_event)
    if None not in (configured.abstain_at, configured.abstain_width):
        outcome, points = RoutingCalibration(fallback, None), []
    else:
        rows = {name: sample.frame(name) for name in fit.unit.names}
        embed = partial(embed_prompts, load_embedder(texts.embedder.here))
        probes = make_probes(rows, *texts.training(), embed, sample.seed).reset_index(drop=True)
        losses = measure_probes(loaded, fit, fallback.rule, probes, sample.token_budget)
        abstention = choose_abstention(
            probes,
            losses,
            places=_candidates(configured.abstain_at, PLACES),
            widths=_candidates(configured.abstain_width, WIDTHS),
        )
        outcome = RoutingCalibration(fallback, abstention)
        seen = probes[["kind", "cluster", "nearest", "nearness"]].assign(losses=losses.tolist())
        points = seen.to_dict("records")
    write_json(target, {**asdict(outcome), "probes": points})
    return outcome


def _fallback(
    loaded: LoadedBase,
    fit: GateFit,
    sample: Sample,
    configured: GateConfig,
    on_event: EventCallback,
) -> FallbackSearch:
    """Choose what is open of the fallback rule."""
    spread, scale = configured.fallback_spread, configured.fallback_scale
    if spread is not None and scale is not None:
        return FallbackSearch(Fallback(spread, scale), ())
    return choose_fallback(
        loaded.model,
        fit,
        sample.token_rows(loaded),
        token_budget=sample.token_budget,
        spreads=_candidates(spread, SPREADS),
        scales=_candidates(scale, SCALES),
        progress=lambda rule, loss: on_event({**asdict(rule), "loss": loss}),
    )


def _candidates(configured: float | None, grid: Sequence[float]) -> Sequence[float]:
    return grid if configured is None else (configured,)
