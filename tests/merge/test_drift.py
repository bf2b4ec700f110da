"""Merges in the metric of the adapters' drift: dense references, and adapters that were trained."""

import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tclora.merge.methods.drift import drifts
from tests.merge.examples import NAMES, make_adapter

MODULE = "proj"
D_OUT, D_IN, RANK = 20, 16, 3
SHAPE = {MODULE: (D_OUT, D_IN)}


def merged(adapters, method, **options):
    return merge(adapters, method, **options).adapter.modules[MODULE].delta()


@pytest.fixture
def adapters():
    """Adapters whose input factors have moved from one start."""
    start = make_adapter("start", RANK, SHAPE, seed=9).modules[MODULE].A
    moved = [make_adapter(name, RANK, SHAPE, seed=k) for k, name in enumerate(NAMES)]
    return [
        Adapter(
            a.name, {MODULE: LoraFactors(a.modules[MODULE].B, start + 0.3 * a.modules[MODULE].A)}
        )
        for a in moved
    ]


def dense_grams(adapters):
    A = torch.stack([a.modules[MODULE].A for a in adapters])
    F = A - A.mean(0)
    small = 1e-4 * A.square().sum((1, 2))
    total = F.square().sum((1, 2)) + small
    equal = (1.01 - F.square().sum((1, 2)) / total)[:, None, None] * torch.eye(D_IN) / D_IN
    return F.mT @ F / total[:, None, None] + equal


def regmean(adapters):
    X = torch.stack([a.modules[MODULE].delta() for a in adapters])
    grams = dense_grams(adapters)
    return (X @ grams).sum(0) @ torch.linalg.inv(grams.sum(0)), grams.sum(0)


def damped(adapters):
    """Shared output directions scaled down as Pico does, the mean norm of the updates kept."""
    K = len(adapters)
    U, S, _ = torch.linalg.svd(torch.cat([a.modules[MODULE].B for a in adapters], dim=1))
    c = torch.zeros(D_OUT).double()
    c[: len(S)] = S.square() / S.square().sum()
    A = torch.stack([a.modules[MODULE].A for a in adapters])
    energy = (A - A.mean(0)).square().sum((1, 2))
    moved = (energy / (energy + 1e-4 * A.square().sum((1, 2)))).max()
    D = U / (1 + (K - 1) * c) ** moved @ U.mT
    before = sum(a.modules[MODULE].delta().norm() for a in adapters)
    gain = before / sum((D @ a.modules[MODULE].delta()).norm() for a in adapters)
    return [
        Adapter(a.name, {MODULE: LoraFactors(gain * D @ a.modules[MODULE].B, a.modules[MODULE].A)})
        for a in adapters
    ]


def test_the_regression_mean_in_the_drifts_metric(adapters):
    expected, _ = regmean(adapters)
    found = merged(adapters, "regmean-drift", damping=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_crowded_output_directions_are_damped_before(adapters):
    expected, _ = regmean(damped(adapters))
    found = merged(adapters, "regmean-drift")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - merged(adapters, "regmean-drift", damping=0)).norm() > 0.05 * found.norm()


def test_adapters_that_have_not_moved_are_not_damped(adapters):
    """A frozen input factor, up to rounding."""
    A = adapters[0].modules[MODULE].A
    frozen = [
        Adapter(a.name, {MODULE: LoraFactors(a.modules[MODULE].B, A * (1 + 1e-9 * k))})
        for k, a in enumerate(adapters)
    ]
    mean = sum(a.modules[MODULE].delta() for a in frozen) / len(frozen)
    torch.testing.assert_close(merged(frozen, "regmean-drift"), mean, rtol=1e-6, atol=1e-6)


def test_adapters_without_the_module_crowd_nothing(adapters):
    strangers = [Adapter(name, {}) for name in ("x", "y", "z")]
    X = torch.stack([a.modules[MODULE].delta() for a in damped(adapters)])
    grams = dense_grams(adapters)
    equal = 1.01 * torch.eye(D_IN) / D_IN
    expected = (X @ grams).sum(0) @ torch.linalg.inv(grams.sum(0) + len(strangers) * equal)
    found = merged([*adapters, *strangers], "regmean-drift", force=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_damping_that_raises_is_refused(adapters):
    with pytest.raises(ValueError, match="damping must be at least 0, got -1"):
        merged(adapters, "regmean-drift", damping=-1)


def test_truncation_is_optimal_in_the_drifts_metric(adapters):
    full, metric = regmean(damped(adapters))
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.mT
    U, S, Vh = torch.linalg.svd(full @ root, full_matrices=False)
    expected = U[:, :2] * S[:2] @ Vh[:2] @ torch.linalg.inv(root)
    found = merged(adapters, "regmean-drift", rank=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_joint_cp_lies_between_the_best_of_its_rank_and_the_mean(adapters):
    full, metric = regmean(damped(adapters))

    def error(method):
        delta = full - merged(adapters, method, rank=4)
        return torch.einsum("oi,ij,oj->", delta, metric, delta).sqrt()

    best, found, mean = map(error, ("regmean-drift", "tc-lora-drift", "tc-lora-mean"))
    assert best < found < 0.5 * mean


@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 2, 3)])
def test_adapters_without_a_common_start_are_averaged(ranks):
    strangers = [
        make_adapter(name, rank, SHAPE, seed=k)
        for k, (name, rank) in enumerate(zip(NAMES, ranks, strict=True))
    ]
    assert not any(F.any() for F in drifts([a.modules[MODULE].A for a in strangers]))
    mean = sum(a.modules[MODULE].delta() for a in strangers) / len(strangers)
    torch.testing.assert_close(merged(strangers, "regmean-drift"), mean, rtol=1e-6, atol=1e-6)


def test_an_adapter_without_the_module_has_no_drift(adapters):
    A = [a.modules[MODULE].A for a in adapters]
    found = drifts([*A, A[0].new_zeros(0, D_IN)])
    assert [F.shape[0] for F in found] == [RANK, RANK, RANK, 0]
    torch.testing.assert_close(torch.stack(found[:3]), torch.stack(A) - torch.stack(A).mean(0))


def test_trained_adapters_keep_more_of_themselves_than_in_a_mean():
    """Three regressions, each on inputs of its own few directions, LoRAs trained by descent."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    start, trained, inputs = normal(4, 48) / 48**0.5, [], []
    for name in NAMES:
        x = normal(200, 5) @ normal(5, 48) / 5**0.5 + 0.1 * normal(200, 48)
        y = x @ normal(48, 16) / 48**0.5
        A, B = start.clone().requires_grad_(), torch.zeros(16, 4).double().requires_grad_()
        optimiser = torch.optim.Adam([A, B], lr=0.005)
        for _ in range(100):
            optimiser.zero_grad()
            (x @ A.mT @ B.mT - y).square().mean().backward()
            optimiser.step()
        trained.append(Adapter(name, {MODULE: LoraFactors(B.detach(), A.detach())}))
        inputs.append(x)

    def lost(delta):
        own = [a.modules[MODULE].delta() for a in trained]
        pairs = zip(inputs, own, strict=True)
        shares = [(x @ (delta - D).mT).norm() / (x @ D.mT).norm() for x, D in pairs]
        return float(sum(shares)) / len(shares)

    mean = lost(sum(a.modules[MODULE].delta() for a in trained) / len(trained))
    assert lost(merged(trained, "regmean-drift")) < 0.85 * mean
    small = [lost(merged(trained, method, rank=4)) for method in ("tc-lora-drift", "svd")]
    assert small[0] < 0.96 * small[1]
