"""How a library routes: in domain, reworded, out of domain and composed, beside other ways.

Usage: ``python benchmarks/routing.py LIBRARY WORK [ROWS]``, a finished run with held-out rows and a
folder that keeps what was measured, so that a stopped measurement goes on. A library of the demo's
families gets `ROWS` (20) new rows of each and ``rewordings.jsonl``; any other its own held-out
rows. Fallback and abstention are calibrated on training rows of the run alone.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from held_out import Opened
from peft import ArrowConfig, create_arrow_model
from rewordings import FILE
from routed_rivals import lorauter, spectr, stacked
from safetensors.numpy import load_file
from tables import report

from tclora.adapter import Adapter
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.cluster.vectors import Embeddings
from tclora.data.demo import FAMILIES
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.scorers.choosing import default_scorer
from tclora.files import atomic_path, write_json
from tclora.library.names import BASE, JOINT, OWN
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

ROWS, NEW_TOKENS, BUDGET = 20, 12, 2048
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
            self.model, self.gate_fit, sample.batches(loaded),
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


def constant(routing: Routing, belonging: float) -> Routing:
    """Return a routing with one belonging for all prompts."""
    shares = np.full(len(routing.known), belonging, dtype="float32")
    return replace(routing, known=shares >= 0.5, belonging=shares)


def measure_all(bench: Bench) -> tuple[dict[str, pd.DataFrame], dict[str, Routing]]:
    """Measure every way to answer; return the items and the routings of those that route."""
    fallback, abstention = bench.rules()
    ours = bench.gate_fit.gated(fallback)
    before = bench.gate_fit.gated()  # falls back to the static merge
    nearest = bench.router(NEVER).route(bench.vectors)
    items = {
        BASE: bench.measured(BASE),
        "static": bench.with_adapter("static", bench.primary),
        JOINT: bench.with_adapter(JOINT, bench.read(bench.layout.adapter(JOINT))),
        "fallback alone": bench.with_adapter("fallback alone", ours.blended(1.0).adapter),
        "static, half fallback": bench.with_adapter(
            "static, half fallback", ours.blended(0.5).adapter
        ),
        "average of the adapters": bench.with_adapter(
            "average of the adapters", stacked(bench.adapters).mixed(_even(bench))
        ),
    }
    routings = {
        "never abstaining": nearest,
        "softmax, never abstaining": bench.router(NEVER, "softmax").route(bench.vectors),
        "membership, never abstaining": bench.router(NEVER, "membership").route(bench.vectors),
        OURS: bench.router(abstention).route(bench.vectors),
        "step": bench.router(replace(abstention, width=0.0)).route(bench.vectors),
        "default rules": bench.router(Abstention()).route(bench.vectors),
    }
    items |= bench.routed(ours, routings)
    earlier = {
        "before (static beyond a threshold)": bench.former(),
        "smooth, towards static": routings[OURS],
    }
    items |= bench.routed(before, earlier)
    centroids = bench.router(NEVER).clusters.centroids
    separate = {
        "LORAUTER, separate adapters": lorauter(bench.vectors, centroids),
        "nearest, separate adapters": nearest,
    }
    items |= bench.routed(stacked(bench.adapters), separate)
    for top_k in (1, None):
        name = f"SpectR, {'all' if top_k is None else f'top {top_k}'}"
        items[name] = bench.measured(
            name, lambda _, k=top_k: spectr(bench.model, bench.adapters, k)
        )
        name = f"PEFT Arrow, top {top_k or 3}"
        items[name] = bench.measured(name, model=_arrow(bench, name, top_k or 3))
    return items, routings | earlier | separate


def _even(bench: Bench) -> list[float]:
    return [1 / len(bench.adapters)] * len(bench.adapters)


def _arrow(bench: Bench, name: str, top_k: int) -> Any:  # noqa: ANN401
    if (bench.work / f"{name}.parquet").exists():
        return None
    paths = [str(bench.layout.adapter(adapter.name)) for adapter in bench.adapters]
    config = ArrowConfig(top_k=min(top_k, len(paths)), router_temperature=1.0)
    return create_arrow_model(
        base_model=bench.base(), task_specific_adapter_paths=paths, arrow_config=config
    ).eval()


def own_items(bench: Bench) -> pd.DataFrame:
    """Measure rows of trained tasks under their cluster's own adapter."""
    known = bench.rows["cluster"].notna() & bench.rows["split"].isin(["test", "reworded"])
    weights = np.full((len(bench.rows), len(bench.adapters)), 1 / len(bench.adapters), "float32")
    labels = bench.rows["cluster"].fillna(0).astype(int)
    weights[known] = np.eye(len(bench.adapters), dtype="float32")[labels[known]]
    everyone = np.ones(len(weights), dtype=bool)
    routing = {OWN: Routing(weights, everyone, weights.max(axis=1))}
    items = bench.routed(stacked(bench.adapters), routing)[OWN]
    return items[items["id"].isin(bench.rows.loc[known, "id"])]


def table(
    bench: Bench, items: dict[str, pd.DataFrame], routings: dict[str, Routing]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield every split and a table of the methods on it."""
    for split, group in bench.rows.groupby("split", sort=False):
        ids = group["id"].tolist()
        parts = {m: i.set_index("id").reindex(ids).dropna(subset="nll") for m, i in items.items()}
        base, routed, static = (parts[name]["nll"] for name in (BASE, "never abstaining", "static"))
        better = np.minimum(routed, static)  # row by row
        tokens = parts[BASE]["tokens"].sum()
        rows = []
        for method, part in parts.items():
            if len(part) < len(group):  # the own adapters, where rows belong to none
                continue
            gain = base.sum() - better.sum()
            split_gain = base.sum() - min(routed.sum(), static.sum())
            row: dict[str, Any] = {
                "method": method,
                "NLL": part["nll"].sum() / tokens,
                "accuracy": part["correct"].astype(float).mean(),
                "regret, row by row (%)": 100 * (part["nll"].sum() - better.sum()) / gain,
                "regret, whole (%)": 100
                * (part["nll"].sum() - min(routed.sum(), static.sum()))
                / split_gain,
            }
            if method in routings:
                row |= _routing_figures(group, routings[method])
            rows.append(row)
        yield str(split), pd.DataFrame(rows).fillna("-")


def _routing_figures(group: pd.DataFrame, routing: Routing) -> dict[str, object]:
    """Return coverage, share routed rightly, and share wrongly abstained from."""
    known = routing.known[group.index]
    figures: dict[str, object] = {
        "coverage (%)": 100 * known.mean(), "belonging": routing.shares[group.index].mean(),
    }  # fmt: skip
    if group["cluster"].notna().all() and set(group["split"]) <= {"test", "reworded"}:
        right = routing.weights[group.index].argmax(axis=1) == group["cluster"].to_numpy()
        figures["nearest right (%)"] = 100 * right.mean()
        figures["wrongly abstained (%)"] = 100 * (right & ~known).mean()
    return figures


_TITLES = {
    "test": "In domain", "reworded": "Reworded", "ood": "Out of domain",
    "composition": "Composition",
}  # fmt: skip


def main(library: Path, work: Path, rows: int) -> None:
    """Measure everything and report."""
    bench = Bench(library, work, rows)
    items, routings = measure_all(bench)
    items[OWN] = own_items(bench)
    fallback, abstention = bench.rules()
    print(fallback, abstention)
    for split, frame in table(bench, items, routings):
        count = int((bench.rows["split"] == split).sum())
        title = _TITLES.get(split, split)
        report(
            f"routing_{library.name}_{split}",
            f"{title}: ways to answer {count} rows",
            frame,
            f"{library.name}: fallback {fallback}, abstention {abstention}, calibrated on 8 "
            "training rows per cluster. Regret against the better of routed and static, of the "
            "gain in NLL over the base.",
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else ROWS)
