"""Every method against its dense, published form on small shapes."""

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch.linalg import svd

from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tclora.merge.truncate import leading_svd
from tests.merge.examples import D_IN, MODULES, NAMES, make_adapter

MODULE = "layers.0.q"


def dense(adapters):
    return torch.stack([a.modules[MODULE].delta() for a in adapters])  # (K, d_out, d_in)


def merged(adapters, method, **options):
    return merge(adapters, method, **options).adapter.modules[MODULE].delta()


def full_rank_adapters(K=2):
    """Adapters that fill the space, where span-restricted and published forms agree."""
    return [make_adapter(f"a{k}", rank=16, seed=k) for k in range(K)]


def truncated(delta, rank):
    U, S, Vh = svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def trimmed(deltas, density):
    flat = deltas.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).reshape(deltas.shape)


def ties(deltas, density):
    values = trimmed(deltas, density)
    signs = torch.where(values.sum(0) >= 0, 1, -1)
    agree = values.sign() == signs
    return (values * agree).sum(0) / agree.sum(0).clamp_min(1)


def check(found, expected, tolerance=1e-6):
    assert (found - expected).norm() < tolerance * expected.norm()


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


@pytest.mark.parametrize("method", ["tsv-m", "iso-c"])
def test_merges_of_singular_vectors_are_the_same_in_core_space(adapters, method):
    """Of the cores of published Core Space, whose bases they do not depend on."""
    factors = [a.modules[MODULE] for a in adapters]
    Q_B, *_ = svd(torch.cat([f.B for f in factors], dim=1), full_matrices=False)
    Q_A, *_ = svd(torch.cat([f.A.mT for f in factors], dim=1), full_matrices=False)
    inside = [
        Adapter(a.name, {MODULE: LoraFactors(Q_B.mT @ f.B, f.A @ Q_A)}, a.base_model)
        for a, f in zip(adapters, factors, strict=True)
    ]
    check(merged(adapters, method), Q_B @ merged(inside, method) @ Q_A.mT)


def test_svc(adapters):
    X = dense(adapters)
    U, S, Vh = svd(X.mean(0), full_matrices=False)
    expected = torch.zeros_like(X[0])
    for u, s, vh in zip(U.mT[:9], S[:9], Vh[:9], strict=True):
        responses = X.mT @ u  # (K, d_in)
        shares = (responses @ (s * vh)) / responses.square().sum(1)
        expected += s / shares.clamp_min(1 / 3).mean() * torch.outer(u, vh)
    check(merged(adapters, "svc"), expected)
    check(merged(adapters, "svc", rank=4), truncated(expected, 4))


def test_svc_leaves_what_all_share_and_adds_up_what_one_has_alone():
    eye = torch.eye(D_IN, dtype=torch.float64)
    alike = [Adapter(n, {MODULE: LoraFactors(eye[:, :2], eye[:2])}, "base") for n in NAMES]
    check(merged(alike, "svc"), dense(alike).mean(0))
    apart = [
        Adapter(n, {MODULE: LoraFactors(eye[:, 2 * k : 2 * k + 2], eye[2 * k : 2 * k + 2])}, "base")
        for k, n in enumerate(NAMES)
    ]
    check(merged(apart, "svc"), dense(apart).sum(0))


@pytest.mark.parametrize("seed", range(3))
def test_svc_takes_the_rounding_of_stored_adapters_for_no_response(seed):
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(32, 32).double())[0] for _ in range(2))
    apart = [
        Adapter(
            str(k),
            {
                MODULE: LoraFactors(
                    (left[:, own] @ torch.randn(2, 2).double()).float(),
                    (torch.randn(2, 2).double() @ right[:, own].mT).float(),
                )
            },
            "base",
        )
        for k, own in enumerate(torch.arange(8).split(2))
    ]
    check(merged(apart, "svc"), dense(apart).sum(0), tolerance=1e-4)


@pytest.mark.parametrize("gauge", ["published", "balanced"])
def test_pico(adapters, gauge):
    X = dense(adapters)
    Bs = [a.modules[MODULE].B for a in adapters]
    if gauge == "balanced":
        U, S, _ = svd(X, full_matrices=False)
        Bs = list(U[..., :3] * S[:, None, :3].sqrt())
    U, S, _ = svd(torch.cat(Bs, dim=1), full_matrices=False)
    damping = 1 / (1 + 2 * S.square() / S.square().sum())
    calm = X + U @ ((damping - 1)[:, None] * (U.mT @ X))
    total, norm = calm.sum(0), X.flatten(1).norm(dim=1).mean()
    check(merged(adapters, "pico", gauge=gauge), total / total.norm() * norm)
    sparse = ties(calm, 0.2)
    found = merged(adapters, "pico", gauge=gauge, rule="ties", rank=16)
    check(found, sparse / sparse.norm() * norm)
    with pytest.raises(ValueError, match="rule must be one of"):
        merged(adapters, "pico", rule="average")


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_compress_then_merge(adapters, beta):
    X = dense(adapters)
    norms = X.flatten(1).norm(dim=1)[:, None, None]
    rescaled = X / norms * (beta * norms + (1 - beta) * norms.mean())
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (_, (U, V)), _ = partial_tucker(
            rescaled, rank=[4, 4], modes=[1, 2], n_iter_max=2000, tol=1e-14
        )
    cores = U.mT @ X @ V
    found = merged(adapters, "compress-then-merge", rank=4, density=1, beta=beta)
    signs = torch.where(cores.sum(0) >= 0, 1, -1)
    agree = cores.sign() == signs
    expected = U @ ((cores * agree).sum(0) / agree.sum(0).clamp_min(1)) @ V.mT
    check(found, expected, 1e-3)
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        merged(adapters, "compress-then-merge", beta=2)


def test_tsv_m_at_the_published_number_of_components():
    """Each of K updates gives min(d)/K singular vectors; together they fill the space."""
    adapters = full_rank_adapters()
    U, S, Vh = svd(dense(adapters), full_matrices=False)
    k = D_IN // 2
    left, right = torch.cat(list(U[..., :k]), dim=1), torch.cat(list(Vh[:, :k]))
    (P, _, Qh), (G, _, Hh) = svd(left, full_matrices=False), svd(right, full_matrices=False)
    expected = P @ Qh @ torch.diag(S[:, :k].flatten()) @ G @ Hh
    check(merged(adapters, "tsv-m", components=k), expected)


def test_iso_c_published():
    adapters = full_rank_adapters()
    U, S, Vh = svd(dense(adapters).sum(0), full_matrices=False)
    check(merged(adapters, "iso-c", scale=1.3), 1.3 * S.mean() * U @ Vh)


def test_iso_cts_published():
    adapters = full_rank_adapters()
    X, K = dense(adapters), 2
    size = D_IN
    own = round((size - int(size * 0.8)) / K)
    common = size - own * K
    U, S, Vh = svd(X.sum(0), full_matrices=False)
    lefts, values, rights = [U[:, :common]], [S[:common]], [Vh[:common]]
    for delta in X:
        u, s, vh = svd(delta - U[:, :common] @ U[:, :common].mT @ delta, full_matrices=False)
        lefts, values, rights = [*lefts, u[:, :own]], [*values, s[:own]], [*rights, vh[:own]]
    P, _, Qh = svd(torch.cat(lefts, dim=1), full_matrices=False)
    G, _, Hh = svd(torch.cat(rights), full_matrices=False)
    expected = torch.cat(values).mean() * (P @ Qh) @ (G @ Hh)
    check(merged(adapters, "iso-cts"), expected)


@pytest.mark.parametrize("rank", [1, 4])
def test_iso_c_chooses_its_directions_before_it_flattens(adapters, rank):
    U, S, Vh = svd(dense(adapters).sum(0), full_matrices=False)
    expected = S[:rank].mean() * U[:, :rank] @ Vh[:rank]
    check(merged(adapters, "iso-c", rank=rank), expected)


def test_iso_cts_divides_the_rank_asked_for(adapters):
    """Of five directions two are common, three the adapters' own."""
    result = merge(adapters, "iso-cts", rank=5, common_fraction=0.4).adapter.modules[MODULE]
    U, S, _ = svd(dense(adapters).sum(0), full_matrices=False)
    rest = dense(adapters) - U[:, :2] @ U[:, :2].mT @ dense(adapters)
    own = svd(rest, full_matrices=False)
    values = torch.cat([S[:2], own.S[:, 0]])
    assert result.rank == 5
    torch.testing.assert_close(svd(result.delta()).S[:5], values.mean().expand(5))


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
