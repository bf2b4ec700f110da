"""Merges of singular vectors against their dense, published forms on small shapes."""

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch.linalg import svd

from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tests.merge.dense import MODULE, check, dense, full_rank_adapters, merged, ties, truncated
from tests.merge.examples import D_IN, NAMES


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
