"""Libraries of shared factors, every row by its own cluster's update, at the bytes of one adapter.

Symbols: K adapters, r the LoRA rank, R the rank of what is shared.
"""

import json
from collections.abc import Callable, Iterator, Sequence

from merge_bench import Adapters, Bench
from merge_scoring import Routed

from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import module_factors, module_names
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.config import GateConfig
from tclora.jobs.devices import exclusive
from tclora.merge import merge
from tclora.merge.inputs import MergeInputs
from tclora.model.locate import locate_embedder, model_digest
from tclora.model.place import ModelPlace
from tclora.model.sample import Sample
from tclora.route import Abstention, Fallback, GatedAdapter, fit_gates, fit_router
from tclora.tensor import compress
from tclora.tensor.tucker import tucker2
from tclora.tune.routing import ClusteredTexts, calibrate_routing

_ROUTING_ROWS = 8  # per cluster, as a run's own default
_MERGE = "calibrated@r@tc-lora,_base_model's_activations"
_METRIC = "calibrated@r@tc-lora,_clusters'_own_metrics"
_REFITTED = _MERGE.replace("calibrated", "refitted", 1)


def libraries(
    bench: Bench, merged: Callable[[str], Adapter]
) -> Iterator[tuple[str, Callable[[], Adapters]]]:
    """Yield the name of every library and what makes its clusters' adapters."""
    yield "library@r@SVD_of_each_adapter,_r_by_K_components", lambda: _each(bench)
    yield "library@r@JD-Diag_(CP_of_the_updates)", lambda: _diagonal(bench)
    yield "library@r@JD-Full_(Tucker-2_of_the_updates)", lambda: _full(bench)
    within = "library@r@JD-Full_within_the_bytes_of_gates"
    yield within, lambda: _full(bench, within_gates=True)
    yield "library@r@gates_on_tc-lora", lambda: _gated(bench, merged(_MERGE))
    yield "library@r@gates_on_tc-lora,_refitted", lambda: _gated(bench, merged(_REFITTED))
    in_metrics = "library@r@gates_on_tc-lora,_clusters'_own_metrics"
    yield in_metrics, lambda: _gated(bench, merged(_METRIC))
    elsewhere = "calibrated@r@tc-lora,_base_model's_activations,_its_fallback_alone"
    yield elsewhere, lambda: _with_fallback(bench, _MERGE, merged)[0].blended(1.0).adapter
    routed = "library@r@gates_on_tc-lora,_routed_by_text_towards_its_fallback"
    yield routed, lambda: _routed(bench, _MERGE, merged)
    yield (
        f"{in_metrics},_routed_by_text_towards_its_fallback",
        lambda: _routed(bench, _METRIC, merged),
    )


def _each(bench: Bench) -> Adapters:
    rank = max(1, bench.r // len(bench.adapters))
    return {k: merge([a], "svd", rank=rank).adapter for k, a in enumerate(bench.adapters)}


def _diagonal(bench: Bench) -> Adapters:
    factors = bench.factors(bench.r)
    return {k: factors.reconstruct(a.name) for k, a in enumerate(bench.adapters)}


def _full(bench: Bench, within_gates: bool = False) -> Adapters:
    """Return U (Uᵀ Δ_k V) Vᵀ with the best common orthonormal U and V of rank r.

    Its K cores take r² numbers each where gates take r; `within_gates` lowers the rank of U and V
    until all of it takes no more than U and V of rank r with gates.
    """
    own: list[dict[str, LoraFactors]] = [{} for _ in bench.adapters]
    for module in module_names(bench.adapters):
        factors = module_factors(bench.adapters, module)
        core = compress([f.B for f in factors], [f.A for f in factors])
        rank = _rank_within_gates(factors, bench.r) if within_gates else bench.r
        U, V = tucker2(core.core, rank)
        cores = U.mT @ core.core @ V  # (K, r, r)
        left, right = core.left @ U, (core.right @ V).mT
        for modules, middle in zip(own, cores, strict=True):
            modules[module] = LoraFactors((left @ middle).float(), right.float())
    return {k: Adapter(name, own[k]) for k, name in enumerate(bench.names)}


def _rank_within_gates(factors: Sequence[LoraFactors], r: int) -> int:
    """Return the largest R with R (d_out + d_in) + K R² ≤ r (d_out + d_in) + K r."""
    K, sides = len(factors), sum(factors[0].shape)
    return max(R for R in range(1, r + 1) if R * (sides + K * R) <= r * (sides + K))


def _gated(bench: Bench, static: Adapter) -> Adapters:
    gated = fit_gates(bench.adapters, static, bench.statistics("base"))
    return {k: gated.cluster(a.name) for k, a in enumerate(bench.adapters)}


def _routed(bench: Bench, key: str, merged: Callable[[str], Adapter]) -> Routed:
    """Route every row by its text, towards the fallback gate where it is far from all clusters."""
    gated, abstention, texts = _with_fallback(bench, key, merged)
    vectors, labels = texts.training()
    router = fit_router(vectors, labels, abstention=abstention, seed=bench.seed, coverage=0.99)
    embedder = load_embedder(texts.embedder.here)
    return Routed(gated, router.route(embed_prompts(embedder, bench.rows["prompt"].tolist())))


def _with_fallback(
    bench: Bench, key: str, merged: Callable[[str], Adapter]
) -> tuple[GatedAdapter, Abstention, ClusteredTexts]:
    """Calibrate gates and router on sample rows by a run's own job, unless that has been done."""
    static = merged(key)
    target = bench.store / ("routing.json" if key == _MERGE else "routing-metric.json")
    location = locate_embedder(bench.manifest.embedding_model.id)
    texts = ClusteredTexts(
        embeddings=bench.layout.embeddings,
        clusters=bench.layout.clusters,
        embedder=ModelPlace(location=location, digest=model_digest(location)),
    )
    statistics = bench.statistics("base")
    with exclusive(target.with_suffix(".lock")):
        if not target.exists():
            calibrate_routing(
                base=bench.loaded.base,
                sample=Sample(
                    rows={name: bench.layout.rows(name) for name in bench.names},
                    count=_ROUTING_ROWS, use="route", seed=bench.seed, token_budget=bench.budget,
                ),
                given=MergeInputs(
                    adapters={name: bench.layout.adapter(name) for name in bench.names},
                    statistics=tuple(bench.statistics_files("base")),
                ),
                merged=bench.store / "merges" / key,
                texts=texts,
                configured=GateConfig(),
                target=target,
                on_event=print,
            )  # fmt: skip
    found = json.loads(target.read_text(encoding="utf-8"))
    fallback = Fallback(**found["fallback"]["rule"])
    gated = fit_gates(bench.adapters, static, statistics, fallback=fallback)
    return gated, Abstention(**found["abstention"]["rule"]), texts
