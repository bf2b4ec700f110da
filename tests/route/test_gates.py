from dataclasses import replace

import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.errors import AdapterError
from tclora.merge import merge
from tclora.route import fit_gates
from tests.merge.examples import MODULES, NAMES, assert_same_updates, make_adapter, make_statistics


@pytest.fixture
def parts():
    return [make_adapter(name, seed=k) for k, name in enumerate(NAMES)]


def metric_of(statistics, module):
    """The clusters' Gram matrices as merges use them, off-diagonals shrunk; the scale is free."""
    grams = statistics.of(module, NAMES)
    return 0.9 * grams + 0.1 * torch.diag_embed(grams.diagonal(dim1=1, dim2=2))


def distance(one, other, gram):
    return float(torch.trace((one - other) @ gram @ (one - other).mT))


def test_enough_components_give_every_adapter_back(parts):
    gated = fit_gates(parts, merge(parts, "tc-lora-mean", rank=9).adapter)
    for k, own in enumerate(parts):
        assert_same_updates(gated.cluster(own.name), own, 1e-4)
        assert_same_updates(gated.cluster(k), own, 1e-4)


def test_gates_are_the_least_squares_solution(parts):
    statistics = make_statistics()
    merged = merge(parts, "tc-lora-mean", rank=4).adapter
    gated = fit_gates(parts, merged, statistics)
    module = next(iter(MODULES))
    B, A = gated.components(module)
    assert B.norm(dim=0).tolist() == pytest.approx([1] * 4)
    assert A.norm(dim=1).tolist() == pytest.approx([1] * 4)
    for k, own in enumerate(parts):
        gram = metric_of(statistics, module)[k]
        root = torch.linalg.cholesky(gram + 1e-12 * torch.eye(len(gram), dtype=gram.dtype))
        columns = [torch.outer(B[:, i], A[i] @ root).flatten() for i in range(4)]
        wanted = (own.modules[module].delta() @ root).flatten()
        solution = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution[:, 0]
        assert gated.gates[module][k].tolist() == pytest.approx(solution.tolist(), rel=1e-4)


@pytest.mark.parametrize("informed", [False, True])
def test_a_gated_cluster_is_never_farther_from_its_adapter_than_the_static_merge(parts, informed):
    statistics = make_statistics() if informed else None
    merged = merge(parts, "tc-lora", rank=3, statistics=statistics).adapter
    gated = fit_gates(parts, merged, statistics)
    for k, own in enumerate(parts):
        for module, factors in own.modules.items():
            d_in = factors.A.shape[1]
            eye = torch.eye(d_in, dtype=torch.float64)
            gram = metric_of(statistics, module)[k] if statistics else eye
            delta = factors.delta()
            routed = gated.cluster(k).modules[module].delta().double()
            static = merged.modules[module].delta().double()
            assert distance(routed, delta, gram) <= distance(static, delta, gram) * (1 + 1e-5)


def test_a_mixture_is_linear_in_its_weights(parts):
    gated = fit_gates(parts, merge(parts, "tc-lora-mean", rank=4).adapter)
    half = gated.mixed([0.5, 0.5, 0.0])
    for module, factors in half.modules.items():
        mean = (
            gated.cluster(0).modules[module].delta() + gated.cluster(1).modules[module].delta()
        ) / 2
        assert torch.allclose(factors.delta(), mean, atol=1e-5)


def test_modules_that_an_adapter_lacks_and_ranks_of_their_own_are_gated_too():
    some = {m: MODULES[m] for m in list(MODULES)[:2]}
    parts = [make_adapter(NAMES[0], 4, seed=0), make_adapter(NAMES[1], 2, some, seed=1)]
    full = merge(parts, "tc-lora-mean", rank=6).adapter
    gated = fit_gates(parts, full)
    lacking = list(MODULES)[2]
    assert gated.cluster(1).modules[lacking].delta().abs().max() < 1e-5
    assert {module: gate.shape[1] for module, gate in gated.gates.items()} == {
        module: factors.rank for module, factors in full.modules.items()
    }


def test_redundant_and_empty_components_are_harmless(parts):
    merged = merge(parts, "tc-lora-mean", rank=4).adapter
    doubled = {
        module: LoraFactors(torch.cat([B, B, 0 * B], 1), torch.cat([A, A, A]))
        for module, (B, A) in merged.modules.items()
    }
    once = fit_gates(parts, merged)
    twice = fit_gates(parts, Adapter("doubled", doubled, "base"))
    for k in range(3):
        assert_same_updates(twice.cluster(k), once.cluster(k), 1e-4)


def cancelling():
    """Two adapters whose average is next to nothing: every loading of one cancels the other's."""
    one = make_adapter(NAMES[0], seed=0)
    opposite = {m: LoraFactors(-(1 + 1e-10) * B, A) for m, (B, A) in one.modules.items()}
    return [one, Adapter(NAMES[1], opposite, "base")]


def test_where_loadings_cancel_gates_stay_as_large_as_the_updates():
    parts = cancelling()
    gated = fit_gates(parts, merge(parts, "tc-lora-mean", rank=3).adapter)
    for part in parts:
        assert_same_updates(gated.cluster(part.name), part, 1e-4)
        for module, factors in part.modules.items():
            assert float(gated.gates[module].abs().max()) < 2 * factors.delta().norm()
            assert float(gated.static(module).max()) < 1e-8 * factors.delta().norm()


def test_the_static_gate_gives_the_static_merge(parts):
    merged = merge(parts, "tc-lora-mean", rank=4).adapter
    gated = fit_gates(parts, merged)
    for module, factors in merged.modules.items():
        U, V = gated.components(module)
        assert torch.allclose((U * gated.static(module)) @ V, factors.delta().double())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gates_that_are_not_finite_are_refused(parts, value):
    gated = fit_gates(parts, merge(parts, "tc-lora-mean", rank=4).adapter)
    module = max(gated.gates)
    bad = {**gated.gates, module: gated.gates[module] * value}
    with pytest.raises(AdapterError, match=f"gates of {module} must be finite"):
        replace(gated, gates=bad)


def test_what_does_not_belong_together_is_refused(parts):
    merged = merge(parts, "tc-lora-mean", rank=4).adapter
    lacking = Adapter("lacking", dict(list(merged.modules.items())[1:]), "base")
    with pytest.raises(AdapterError, match="must have the 3 modules"):
        fit_gates(parts, lacking)
    gated = fit_gates(parts, merged)
    with pytest.raises(ValueError, match="cluster must be one of algebra, law, prose"):
        gated.cluster("cooking")
    with pytest.raises(ValueError, match="weights must be 3 finite numbers"):
        gated.mixed([1.0, 2.0])
