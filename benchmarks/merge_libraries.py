"""Libraries of shared factors, every row by its own cluster's update, at the bytes of one adapter.

Symbols: K adapters, r the LoRA rank, R the rank of what is shared.
"""

from collections.abc import Callable, Iterator

from merge_bench import Adapters, Bench

from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import module_factors, module_names
from tclora.merge import merge
from tclora.route import fit_gates
from tclora.tensor import compress
from tclora.tensor.tucker import tucker2

_MERGE = "calibrated@r@tc-lora,_base_model's_activations"
_REFITTED = _MERGE.replace("calibrated", "refitted", 1)


def libraries(
    bench: Bench, merged: Callable[[str], Adapter]
) -> Iterator[tuple[str, Callable[[], Adapters]]]:
    """Yield the name of every library and what makes its clusters' adapters."""
    yield "library@r@SVD_of_each_adapter,_r_by_K_components", lambda: _each(bench)
    yield "library@r@JD-Diag_(CP_of_the_updates)", lambda: _diagonal(bench)
    yield "library@r@JD-Full_(Tucker-2_of_the_updates)", lambda: _full(bench)
    yield "library@r@gates_on_tc-lora", lambda: _gated(bench, merged(_MERGE))
    yield "library@r@gates_on_tc-lora,_refitted", lambda: _gated(bench, merged(_REFITTED))


def _each(bench: Bench) -> Adapters:
    rank = max(1, bench.r // len(bench.adapters))
    return {k: merge([a], "svd", rank=rank).adapter for k, a in enumerate(bench.adapters)}


def _diagonal(bench: Bench) -> Adapters:
    factors = bench.factors(bench.r)
    return {k: factors.reconstruct(a.name) for k, a in enumerate(bench.adapters)}


def _full(bench: Bench) -> Adapters:
    """Return U (Uᵀ Δ_k V) Vᵀ with the best common orthonormal U and V of rank r."""
    own: list[dict[str, LoraFactors]] = [{} for _ in bench.adapters]
    for module in module_names(bench.adapters):
        factors = module_factors(bench.adapters, module)
        core = compress([f.B for f in factors], [f.A for f in factors])
        U, V = tucker2(core.core, bench.r)
        cores = U.mT @ core.core @ V  # (K, r, r)
        left, right = core.left @ U, (core.right @ V).mT
        for modules, middle in zip(own, cores, strict=True):
            modules[module] = LoraFactors((left @ middle).float(), right.float())
    return {k: Adapter(name, own[k]) for k, name in enumerate(bench.names)}


def _gated(bench: Bench, static: Adapter) -> Adapters:
    gated = fit_gates(bench.adapters, static, bench.statistics("base"))
    return {k: gated.cluster(a.name) for k, a in enumerate(bench.adapters)}
