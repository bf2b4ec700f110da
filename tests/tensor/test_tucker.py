import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker

from tclora.tensor.tucker import tucker2


def planted(K, m, n, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, _ = torch.linalg.qr(draw(m, rank))
    V, _ = torch.linalg.qr(draw(n, rank))
    return U, V, U @ draw(K, rank, rank) @ V.mT + noise * draw(K, m, n)


def kept(stack, U, V):
    return (U.mT @ stack @ V).square().sum()


def test_planted_bases_are_found():
    U, V, stack = planted(4, 12, 9, 3, noise=0)
    left, right = tucker2(stack, 3)
    torch.testing.assert_close(left @ left.mT, U @ U.mT)
    torch.testing.assert_close(right @ right.mT, V @ V.mT)


@pytest.mark.parametrize("seed", range(4))
def test_as_much_is_kept_as_by_tensorly(seed):
    *_, stack = planted(5, 14, 11, 4, noise=0.4, seed=seed)
    left, right = tucker2(stack, 4)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, identity)
    torch.testing.assert_close(right.mT @ right, identity)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (_, (U, V)), _ = partial_tucker(stack, rank=[4, 4], modes=[1, 2], n_iter_max=500, tol=1e-10)
    assert kept(stack, left, right) >= (1 - 1e-6) * kept(stack, U, V)


def test_the_rank_is_clamped_and_nothing_is_lost_at_full_rank():
    *_, stack = planted(2, 6, 4, 2, noise=1.0)
    left, right = tucker2(stack, 9)
    assert (left.shape, right.shape) == ((6, 4), (4, 4))
    assert tucker2(torch.zeros(2, 6, 4), 2)[0].isfinite().all()
