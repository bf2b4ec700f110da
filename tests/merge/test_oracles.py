"""Every method against its dense, published form on small shapes."""

import pytest
import torch
from torch.linalg import svd

from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tclora.merge.truncate import leading_svd
from tests.merge.dense import MODULE, check, dense, merged, ties, trimmed, truncated
from tests.merge.examples import D_IN, MODULES, NAMES, make_adapter


def test_averages_and_sums(adapters):
    X = dense(adapters)
    check(merged(adapters, "uniform"), X.mean(0))
    check(merged(adapters, "cat"), X.sum(0))
    check(merged(adapters, "task-arithmetic", scale=0.3), 0.3 * X.sum(0))
    weighted = torch.tensordot(torch.tensor([0.25, 0.75, 0.0]).double(), X, dims=1)
    check(merged(adapters, "uniform", weights=[1, 3, 0]), weighted)
    check(merged(adapters, "uniform", weights={"law": 3, "prose": 0, "algebra": 1}), weighted)


def test_svd_truncates_the_average_optimally(adapters):
    mean = dense(adapters).mean(0)
    check(merged(adapters, "svd"), truncated(mean, 3))
    check(merged(adapters, "uniform", rank=5), truncated(mean, 5))
    _, S, _ = svd(mean)
    one = [Adapter(a.name, {MODULE: a.modules[MODULE]}) for a in adapters]
    loss = merge(one, "uniform", rank=5).truncation_loss
    assert loss == pytest.approx(float(S[5:].square().sum() / S.square().sum()))


def test_the_cp_mean_at_full_rank_is_the_average(adapters):
    check(merged(adapters, "tc-lora", rank=9), dense(adapters).mean(0))
    check(merged(adapters, "tc-lora-sum", rank=9, scale=1), dense(adapters).sum(0))


@pytest.mark.parametrize("density", [0.2, 0.5, 1])
def test_ties(adapters, density):
    expected = ties(dense(adapters), density)
    check(merged(adapters, "ties", density=density, scale=0.7, rank=16), 0.7 * expected)


def test_magnitude_pruning(adapters):
    expected = trimmed(dense(adapters), 0.3).mean(0)
    check(merged(adapters, "magnitude-pruning", density=0.3, rank=16), expected)


def test_dare_keeps_the_expectation(adapters):
    X = dense(adapters)
    runs = [merged(adapters, "dare", density=0.5, rank=16, seed=s) for s in range(300)]
    check(torch.stack(runs).mean(0), X.mean(0), 0.1)
    values = runs[0] * 3  # every entry is a sum of terms 0 or 2 Δ_k
    combos = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)]).double()
    possible = 2 * torch.tensordot(combos, X, dims=1)
    assert (possible - values).abs().amin(0).max() < 1e-4


@pytest.mark.parametrize("density", [0.3, 1])
def test_knots(adapters, density):
    X = dense(adapters)
    U, S, Vh = svd(torch.cat(list(X), dim=1), full_matrices=False)
    kept = S > 1e-8
    blocks = torch.stack((S[kept, None] * Vh[kept]).split(D_IN, dim=1))
    expected = U[:, kept] @ ties(blocks, density)
    check(merged(adapters, "knots-ties", density=density, scale=0.5), 0.5 * expected)


def test_core_space_on_balanced_factors(adapters):
    X = dense(adapters)
    U, S, Vh = svd(X, full_matrices=False)
    U, S, Vh = U[..., :3], S[:, :3], Vh[:, :3]
    root = S.sqrt()[:, None]
    Q_B, s_B, _ = svd(torch.cat(list(U * root), dim=1), full_matrices=False)
    Q_A, s_A, _ = svd(torch.cat(list(Vh.mT * root), dim=1), full_matrices=False)
    Q_B, Q_A = Q_B[:, s_B > 1e-8], Q_A[:, s_A > 1e-8]
    cores = Q_B.mT @ X @ Q_A
    check(merged(adapters, "core-space", density=0.4), Q_B @ ties(cores, 0.4) @ Q_A.mT)


def test_core_space_on_factors_as_they_are(adapters):
    """The published gauge: singular bases of the raw B_k and A_k."""
    factors = [a.modules[MODULE] for a in adapters]
    Q_B, s_B, _ = svd(torch.cat([f.B for f in factors], dim=1), full_matrices=False)
    Q_A, s_A, _ = svd(torch.cat([f.A.mT for f in factors], dim=1), full_matrices=False)
    Q_B, Q_A = Q_B[:, s_B > 1e-8], Q_A[:, s_A > 1e-8]
    cores = Q_B.mT @ dense(adapters) @ Q_A
    found = merged(adapters, "core-space", density=0.4, gauge="published")
    check(found, Q_B @ ties(cores, 0.4) @ Q_A.mT)
    balanced = merged(adapters, "core-space", density=0.4)
    assert (found - balanced).norm() > 0.05 * balanced.norm()


def interference(delta, X):
    return (((delta - X) @ X.mT).square().sum((1, 2)) / X.square().sum((1, 2))).sum()


def published_wudi(X, step_size):
    """300 steps of Adam on the dense update, every element with moments of its own."""
    merged = X.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=step_size)
    for _ in range(300):
        optimizer.zero_grad()
        interference(merged, X).backward()
        optimizer.step()
    return merged.detach()


@pytest.mark.parametrize("step_size", [1e-5, 1e-4])
def test_wudi_follows_the_published_iteration(step_size):
    """Of adapters with much in common, as trained ones have; its minimiser would be far larger."""
    shape = {MODULE: (90, 80)}
    shared = make_adapter("shared", rank=4, modules=shape, seed=9).modules[MODULE]
    adapters = []
    for seed, name in enumerate(NAMES):
        own = make_adapter(name, rank=4, modules=shape, seed=seed).modules[MODULE]
        factors = LoraFactors(shared.B + 0.4 * own.B, 3e-4 * (shared.A + 0.4 * own.A))
        adapters.append(Adapter(name, {MODULE: factors}))
    X = dense(adapters)
    published = published_wudi(X, step_size)
    left, right = svd(X.mT.flatten(0, 1)).Vh[:12], svd(X.flatten(0, 1)).Vh[:12]
    expected = left.mT @ (left @ published @ right.mT) @ right  # in the span of the updates
    found, start = merged(adapters, "wudi", step_size=step_size), X.sum(0)
    assert found.norm() == pytest.approx(float(expected.norm()), rel=0.2)
    assert (found - expected).norm() < 0.3 * expected.norm() < 0.5 * (start - expected).norm()
    assert max(interference(d, X) for d in (found, published)) < 0.05 * interference(start, X)


def test_wudi_without_steps_is_the_sum(adapters):
    check(merged(adapters, "wudi", steps=0), dense(adapters).sum(0))
    with pytest.raises(ValueError, match="step_size above 0, got 300 and 0"):
        merged(adapters, "wudi", step_size=0)


def regmean(X, grams):
    grams = 0.9 * grams + 0.1 * torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    return (X @ grams).sum(0) @ torch.linalg.inv(grams.sum(0)), grams.sum(0)


def test_regmean(adapters, statistics):
    expected, _ = regmean(dense(adapters), statistics.of(MODULE, NAMES))
    check(merged(adapters, "regmean", statistics=statistics), expected)


def test_regmean_is_truncated_optimally_in_the_metric_of_the_inputs(adapters, statistics):
    full, metric = regmean(dense(adapters), statistics.of(MODULE, NAMES))
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.mT
    expected = truncated(full @ root, 2) @ torch.linalg.inv(root)
    check(merged(adapters, "regmean", statistics=statistics, rank=2), expected)


def test_the_activation_merge_lies_between_cp_and_truncated_regmean(adapters, statistics):
    full, metric = regmean(dense(adapters), statistics.of(MODULE, NAMES))
    best = merged(adapters, "regmean", statistics=statistics, rank=4)

    def error(delta):
        return torch.einsum("oi,ij,oj->", full - delta, metric, full - delta).sqrt()

    errors = [
        error(merged(adapters, "tc-lora-activation", statistics=statistics, rank=4, emphasis=e))
        for e in (0.3, 1, 30)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1.001 * error(best)
    exact = merged(adapters, "tc-lora-activation", statistics=statistics, rank=9)
    check(exact, full, 1e-3)


def test_modules_that_no_adapter_shares_keep_their_update():
    parts = [make_adapter(f"a{k}", modules={m: MODULES[m]}, seed=k) for k, m in enumerate(MODULES)]
    result = merge(parts, "cat").adapter
    for part in parts:
        for module, factors in part.modules.items():
            torch.testing.assert_close(result.modules[module].delta(), factors.delta())


def test_large_dense_updates_are_truncated_by_subspace_iteration():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(300, 12, generator=generator) * 0.7 ** torch.arange(12)
    noise = 0.01 * torch.randn(300, 200, generator=generator)
    matrix = left @ torch.randn(12, 200, generator=generator) + noise
    before = torch.get_rng_state()
    U, S, V = leading_svd(matrix, 8, seed=3)
    exact = svd(matrix, full_matrices=False)
    torch.testing.assert_close(S[:8], exact.S[:8], rtol=1e-4, atol=0)
    check(U[:, :8] * S[:8] @ V[:, :8].mT, truncated(matrix, 8), 1e-3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(17)
    assert torch.equal(leading_svd(matrix, 8, seed=3)[0], U)
