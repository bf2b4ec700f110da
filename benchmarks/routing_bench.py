"""A library, rows to route, and ways of routing them; every measurement is kept as it comes."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from held_out import Opened
from rewordings import FILE
from safetensors.numpy import load_file

from tclora.adapter import Adapter
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.cluster.vectors import Embeddings
from tclora.data.demo import FAMILIES
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.scorers.choosing import default_scorer
from tclora.files import atomic_path, write_json
from tclora.library.names import JOINT
from tclora.model.attach import attached
from tclora.model.base import Base, LoadedBase
from tclora.model.locate import (
    choose_dtype,
    default_device,
    load_base_model,
    locate_embedder,
)
from tclora.model.sample import Sample
from tclora.route import Abstention, Fallback, GatedAdapter, Gating, Routing, fit_router
from tclora.route.gates import GateFit, gate_equations
from tclora.route.text import TextClusters
from tclora.tune.abstention import choose_abstention, make_probes, measure_probes
from tclora.tune.fallback import choose_fallback

NEW_TOKENS, BUDGET = 12, 2048
OURS = "smooth"
# Generation takes several times as long as NLL: only these answer in words too.
ANSWERED = ("static", JOINT, OURS, "before (static beyond a threshold)")
NEVER = Abstention(-1e9, 0.0)
Context = Callable[[Sequence[int]], AbstractContextManager[Any]]


class Bench(Opened):
    """A library, the rows to route, and the rules calibrated on its training rows."""

    def __init__(self, library: Path, work: Path, rows: int) -> None:
        super().__init__(library)
        self.work = work / library.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.embedder = load_embedder(locate_embedder(self.manifest.embedding_model.id))
        clusters = pd.read_parquet(self.layout.clusters)
        self.training = (clusters["split"] == "train").to_numpy()
        self.labels = clusters.loc[self.training, "cluster"].to_numpy()
        self.training_vectors = load_file(self.layout.embeddings)["embeddings"][self.training]
        tasks = {family.task for family in FAMILIES if family.split == "train"}
        of_demo = tasks == set(clusters.loc[self.training, "task"].dropna())
        self.rows = self._demo_rows(rows) if of_demo else pd.read_parquet(self.layout.held_out)
        self.rows = self.rows.reset_index(drop=True)
        self.vectors = self.embed(self.rows["prompt"].tolist())

    def base(self) -> Any:  # noqa: ANN401
        """Load the base model as a run evaluates it: in bf16 where that is fast."""
        device = default_device()
        return load_base_model(self.location, choose_dtype("auto", device), device)

    def embed(self, prompts: Sequence[str]) -> Embeddings:
        """Embed prompts by the library's embedding model."""
        return embed_prompts(self.embedder, prompts)

    def _demo_rows(self, count: int) -> pd.DataFrame:
        reworded = pd.read_json(FILE, lines=True, dtype=False)
        reworded = reworded.assign(
            id=[f"reworded-{i}" for i in range(len(reworded))],
            split="reworded",
            answer=reworded["response"],
            scorer=[default_scorer(answer) for answer in reworded["response"]],
            metadata=None,
            cluster=reworded["task"].map(self.cluster_of_task()),
        )
        return pd.concat([self.drawn(count), reworded])

    @cached_property
    def primary(self) -> Adapter:
        """The primary merge."""
        return self.read(self.layout.merged(self.manifest.settings.merge.primary))

    @cached_property
    def gate_fit(self) -> GateFit:
        """The equations of gates on the primary merge."""
        return gate_equations(self.adapters, self.primary, self.statistics)

    def rules(self) -> tuple[Fallback, Abstention]:
        """Calibrate on training rows as a run does, or read what was calibrated before."""
        fallback = self._kept("fallback", self._fallback)
        rule = Fallback(**fallback["rule"])
        abstention = self._kept("abstention", partial(self._abstention, rule))
        return rule, Abstention(**abstention["rule"])

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self.work / f"{name}.json"
        if not file.exists():
            write_json(file, make())
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _sample(self) -> tuple[Sample, LoadedBase]:
        told = self.manifest.settings
        names = [adapter.name for adapter in self.adapters]
        sample = Sample(
            rows={name: self.layout.rows(name) for name in names},
            count=8, use="route", seed=told.seed, token_budget=BUDGET,
        )  # fmt: skip
        base = Base(
            location=self.location, digest=self.manifest.base_model.digest, dtype="float32",
            template=told.train.template, max_tokens=told.train.max_tokens,
        )  # fmt: skip
        return sample, LoadedBase(base, self.model, self.tokenizer)

    def _fallback(self) -> dict[str, Any]:
        sample, loaded = self._sample()
        search = choose_fallback(
            self.model, self.gate_fit, sample.token_rows(loaded), token_budget=BUDGET,
            progress=lambda rule, loss: print(rule, f"{loss:.4f}", flush=True),
        )  # fmt: skip
        tried = [[rule.spread, rule.scale, loss] for rule, loss in search.losses]
        return {"rule": vars(search.rule), "tried": tried}

    def _abstention(self, rule: Fallback) -> dict[str, Any]:
        sample, loaded = self._sample()
        kept = self.labels >= 0
        rows = {name: sample.frame(name) for name in sample.rows}
        vectors, labels = self.training_vectors[kept], self.labels[kept]
        probes = make_probes(rows, vectors, labels, self.embed, sample.seed).reset_index(drop=True)
        losses = measure_probes(loaded, self.gate_fit, rule, probes, BUDGET)
        columns = {f"loss_{i}": losses[:, i] for i in range(losses.shape[1])}
        probes.assign(**columns).to_parquet(self.work / "probes.parquet")
        found = choose_abstention(probes, losses)
        return {"rule": vars(found.rule), "probes": [found.loss, found.never, found.always]}

    def router(self, abstention: Abstention, name: str = "nearest") -> Any:  # noqa: ANN401
        """Fit a router on the training rows."""
        seed = self.manifest.settings.seed
        options = {"abstention": abstention, "seed": seed, "coverage": 0.99}
        return fit_router(self.training_vectors, self.labels, router=name, **options)

    def former(self) -> Routing:
        """Route as version 0.1.0 did: a step halfway between a cluster's rows and the others'."""
        clusters: TextClusters = self.router(NEVER).clusters
        similarity = self.training_vectors @ clusters.centroids.T
        thresholds = []
        for k in range(clusters.k):
            lowest = np.quantile(similarity[self.labels == k, k], 0.01, method="lower")
            others = np.quantile(similarity[self.labels != k, k], 0.99, method="higher")
            thresholds.append(min(lowest, (lowest + others) / 2))
        step = replace(clusters, thresholds=np.array(thresholds, dtype="float32"), widths=None)
        weights = np.eye(clusters.k, dtype="float32")[step.nearest(self.vectors)]
        return step.routing(self.vectors, weights)

    def measured(
        self,
        method: str,
        context: Context = lambda _: nullcontext(),
        model: Any = None,  # noqa: ANN401
    ) -> pd.DataFrame:
        """Measure all rows, or read what was measured before."""
        file = self.work / f"{method}.parquet"
        if not file.exists():
            told = self.manifest.settings.train
            found = evaluate_frame(
                model or self.model, self.tokenizer, self.rows, template=told.template,
                max_tokens=told.max_tokens, token_budget=BUDGET, context=context,
                max_new_tokens=NEW_TOKENS if method in ANSWERED else None,
            )  # fmt: skip
            with atomic_path(file) as fresh:
                found.to_parquet(fresh)
            print(method, f"{found['nll'].sum() / found['tokens'].sum():.4f}", flush=True)
        labels = self.rows[["id", "split", "task", "cluster"]]
        return pd.read_parquet(file).merge(labels, on="id", validate="1:1")

    def with_adapter(self, method: str, adapter: Adapter) -> pd.DataFrame:
        """Measure all rows under one adapter."""
        return self.measured(method, lambda _: attached(self.model, adapter))

    def routed(self, gated: GatedAdapter, routings: dict[str, Routing]) -> dict[str, pd.DataFrame]:
        """Measure all rows by every routing of one gated adapter."""
        if all((self.work / f"{method}.parquet").exists() for method in routings):
            return {method: self.measured(method) for method in routings}
        with self.gated(gated) as (model, gating):
            return {
                method: self.measured(method, partial(_routed_context, routing, gating), model)
                for method, routing in routings.items()
            }


def _routed_context(
    routing: Routing, gating: Gating, rows: Sequence[int]
) -> AbstractContextManager[None]:
    return routing.take(rows).context(gating)
