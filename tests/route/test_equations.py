from dataclasses import replace

import pytest
import torch

from tclora.merge import merge
from tclora.route import Fallback
from tclora.route.gates import gate_equations
from tests.merge.examples import MODULES, NAMES, assert_same_updates, make_adapter, make_statistics
from tests.route.test_gates import metric_of

MODULE = next(iter(MODULES))


@pytest.fixture
def parts():
    return [make_adapter(name, seed=k) for k, name in enumerate(NAMES)]


@pytest.fixture
def fit(parts):
    merged = merge(parts, "tc-lora-mean", rank=4).adapter
    return gate_equations(parts, merged, make_statistics())


def dense(fit, parts, weights):
    """Minimise Σ_ij w_ij ‖(Δ_i − U diag(g) V) G_j^{1/2}‖² on dense matrices."""
    U, V = fit.unit.components(MODULE)
    grams = metric_of(make_statistics(), MODULE)
    rows, right = [], []
    for i, own in enumerate(parts):
        for j, gram in enumerate(grams):
            root = torch.linalg.cholesky(gram + 1e-12 * torch.eye(len(gram), dtype=gram.dtype))
            part = [torch.outer(U[:, r], V[r] @ root).flatten() for r in range(V.shape[0])]
            rows.append(weights[i][j] ** 0.5 * torch.stack(part, 1))
            right.append(weights[i][j] ** 0.5 * (own.modules[MODULE].delta() @ root).flatten())
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(right)[:, None]).solution
    return solution[:, 0]


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("without", [None, 1])
def test_the_fallback_is_the_weighted_least_squares_solution(fit, parts, spread, without):
    kept = [k for k in range(3) if k != without]
    weights = torch.zeros(3, 3, dtype=torch.float64)
    for i in kept:
        for j in kept:
            weights[i, j] = (1 - spread) * (i == j) + spread / len(kept)
    found = fit.fallback(Fallback(spread, 0.7), without)[MODULE]
    wanted = 0.7 * dense(fit, parts, weights)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


def test_with_room_for_every_update_spread_1_is_their_average(parts):
    merged = merge(parts, "tc-lora-mean", rank=9).adapter
    fit = gate_equations(parts, merged, make_statistics())
    gated = fit.gated(Fallback(1.0, 1.0))
    average = merge(parts, "uniform").adapter
    assert_same_updates(gated.blended(1.0).adapter, average, 1e-4)
    halved = fit.gated(Fallback(1.0, 0.5)).blended(1.0).adapter
    for module, factors in halved.modules.items():
        half = average.modules[module].delta() / 2
        assert torch.allclose(factors.delta().double(), half.double(), atol=1e-3)


def test_a_cluster_left_out_has_no_part_in_the_fallback(fit, parts):
    other = make_adapter(NAMES[1], seed=99)
    merged = replace(fit.unit.adapter)
    again = gate_equations([parts[0], other, parts[2]], merged, make_statistics())
    for module, gate in fit.fallback(Fallback(0.5), without=1).items():
        assert torch.allclose(again.fallback(Fallback(0.5), without=1)[module], gate, rtol=1e-5)
        assert not torch.allclose(again.fallback(Fallback(0.5))[module], gate, rtol=1e-3)


def test_a_static_merge_moves_towards_the_fallback_and_gates_stay(fit):
    """Where a component turns round on the way, the clusters' updates must not."""
    opposite = {m: -2 * fit.unit.static(m).float() for m in fit.equations}
    gated = replace(fit.gated(), fallback=opposite)
    moved = gated.blended(1.0)
    for module, factors in moved.adapter.modules.items():
        wanted = -2 * gated.adapter.modules[module].delta()
        assert torch.allclose(factors.delta(), wanted, atol=1e-4)
        assert torch.allclose(moved.elsewhere(module), moved.static(module), rtol=1e-5)
    for k in range(3):
        assert_same_updates(moved.cluster(k), gated.cluster(k), 1e-5)
    assert gated.blended(0.0) is gated
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1\.5"):
        gated.blended(1.5)


@pytest.mark.parametrize("values", [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, float("inf"))])
def test_rules_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="spread must be between 0 and 1 and scale above 0"):
        Fallback(*values)
