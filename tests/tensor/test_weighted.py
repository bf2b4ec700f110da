"""CP in a metric per slice: planted models, TensorLy where all metrics are equal, descent."""

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import parafac

from tclora.tensor.weighted import weighted_cp

K, M, N, R = 5, 7, 6, 3


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def metrics_of(generator):
    x = draw(K, 3 * N, N, generator=generator)
    x = x * torch.rand(K, 1, N, generator=generator, dtype=torch.float64)
    return x.mT @ x


def error(slices, metrics, model):
    off = model.U * model.C[:, None] @ model.V.mT - slices
    return float(torch.einsum("kij,kjl,kil->", off, metrics, off))


def test_a_planted_model_is_found(generator):
    U, V, C = (draw(n, R, generator=generator) for n in (M, N, K))
    slices, metrics = U * C[:, None] @ V.mT, metrics_of(generator)
    start = (U + 0.3 * draw(M, R, generator=generator), V + 0.3 * draw(N, R, generator=generator))
    model = weighted_cp(slices @ metrics, metrics, *start, n_iter=200)
    whole = float(torch.einsum("kij,kjl,kil->", slices, metrics, slices))
    assert error(slices, metrics, model) < 1e-10 * whole
    torch.testing.assert_close(model.U.norm(dim=0), torch.ones(R, dtype=torch.float64))
    torch.testing.assert_close(model.V.norm(dim=0), torch.ones(R, dtype=torch.float64))


def test_with_equal_metrics_it_is_the_plain_cp(generator):
    slices = draw(K, M, N, generator=generator)
    equal = torch.eye(N, dtype=torch.float64).expand(K, -1, -1)
    tl.set_backend("numpy")
    plain = parafac(slices.numpy(), R, n_iter_max=2000, tol=1e-12, init="svd")
    rest = torch.as_tensor(tl.cp_to_tensor(plain)) - slices
    U, V = (torch.as_tensor(factor) for factor in plain.factors[1:])
    model = weighted_cp(slices, equal, U, V, n_iter=50)
    assert error(slices, equal, model) == pytest.approx(float(rest.square().sum()), rel=1e-4)


def test_no_sweep_raises_the_error(generator):
    slices, metrics = draw(K, M, N, generator=generator), metrics_of(generator)
    start = draw(M, R, generator=generator), draw(N, R, generator=generator)
    cross = slices @ metrics
    errors = [
        error(slices, metrics, weighted_cp(cross, metrics, *start, n_iter=sweeps))
        for sweeps in range(8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_metric_says_what_counts(generator):
    """Slices of one component each, two of which R = 1 must choose from."""
    one, other = draw(2, M, generator=generator), draw(2, N, generator=generator)
    slices = one[:, :, None] * other[:, None]
    light, heavy = 1e-4 * torch.eye(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    for metrics, kept in ((torch.stack([heavy, light]), 0), (torch.stack([light, heavy]), 1)):
        start = one.sum(0)[:, None], other.sum(0)[:, None]
        model = weighted_cp(slices @ metrics, metrics, *start, n_iter=50)
        found = model.U * model.C[:, None] @ model.V.mT
        torch.testing.assert_close(found[kept], slices[kept], atol=1e-2, rtol=1e-2)


def test_slices_of_zero_stay_finite():
    cross, metrics = (torch.zeros(K, rows, N, dtype=torch.float64) for rows in (M, N))
    start = torch.eye(M, R, dtype=torch.float64), torch.eye(N, R, dtype=torch.float64)
    model = weighted_cp(cross, metrics, *start)
    assert not (model.U * model.C[:, None] @ model.V.mT).any()
