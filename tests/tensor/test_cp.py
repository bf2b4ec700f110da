import tensorly as tl
import torch
from tensorly.decomposition import parafac

from tclora.tensor import compress, cp_als
from tclora.tensor.cp import cp_exact, extended


def stack(K=4, m=12, n=10, r=3, M=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(M, K, m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(M, K, r, n, generator=generator, dtype=torch.float64)
    return B, A


def planted(R, K=5, m=12, n=10, seed=0):
    """Stacks of R shared rank-one terms, written as one rank-R update per adapter."""
    generator = torch.Generator().manual_seed(seed)
    U, V, C = (torch.randn(d, R, generator=generator, dtype=torch.float64) for d in (m, n, K))
    B = (U * C[:, None])[None]
    return B, V.mT.expand(1, K, R, n), U


def dense(solution):
    return torch.einsum("zkr,zmr,znr->zkmn", solution.C, solution.U, solution.V)


def relative_error(solution, B, A):
    X = B @ A
    return (X - dense(solution)).flatten(1).norm(dim=1) / X.flatten(1).norm(dim=1)


def test_reported_error_is_the_dense_one():
    B, A = stack()
    solution = cp_als(B, A, 5)
    torch.testing.assert_close(solution.error, relative_error(solution, B, A))


def test_a_planted_model_is_recovered_up_to_order():
    B, A, U = planted(4)
    solution = cp_als(B, A, 4, n_iter=300, tol=1e-12)
    assert solution.error.max() < 1e-6
    cosines = (solution.U[0].mT @ (U / U.norm(dim=0))).abs()
    torch.testing.assert_close(cosines.max(0).values, torch.ones(4, dtype=torch.float64))


def test_fit_never_decreases_over_sweeps():
    B, A = stack(K=6, r=4, m=24, n=24)
    errors = torch.stack([cp_als(B, A, 6, n_starts=1, n_iter=n, tol=0).error for n in range(0, 30)])
    assert (errors.diff(dim=0) <= 1e-12).all()


def test_conventions_unit_columns_sorted_energy_positive_sums():
    B, A = stack()
    solution = cp_als(B, A, 5)
    one = torch.ones(2, 5, dtype=torch.float64)
    torch.testing.assert_close(solution.U.norm(dim=1), one)
    torch.testing.assert_close(solution.V.norm(dim=1), one)
    assert (solution.C.sum(1) >= 0).all()
    assert (solution.C.norm(dim=1).diff(dim=1) <= 0).all()


def test_no_worse_than_the_best_of_ten_parafac_starts():
    B, A = stack(K=5, m=15, n=15, r=3, M=1, seed=3)
    X = B[0] @ A[0]
    tl.set_backend("numpy")
    errors = []
    for seed in range(10):
        model = parafac(X.numpy(), 6, n_iter_max=200, init="random", random_state=seed, tol=1e-8)
        errors.append(float(tl.norm(X.numpy() - tl.cp_to_tensor(model)) / tl.norm(X.numpy())))
    assert float(cp_als(B, A, 6).error[0]) <= min(errors) * 1.001


def test_modules_of_a_batch_do_not_influence_each_other():
    B, A = stack(M=3)
    together = cp_als(B, A, 5, tol=1e-4)
    for i in range(3):
        alone = cp_als(B[i : i + 1], A[i : i + 1], 5, tol=1e-4)
        torch.testing.assert_close(together.error[i : i + 1], alone.error)


def test_same_seed_same_bytes():
    B, A = stack()
    one, two = (cp_als(B, A, 5, n_starts=5, seed=7) for _ in range(2))
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.C, two.C)


def test_order_of_adapters_does_not_change_the_fit():
    B, A = stack()
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        cp_als(B, A, 5).error, cp_als(B[:, order], A[:, order], 5).error, atol=1e-4, rtol=0
    )


def test_total_rank_reproduces_everything():
    B, A = stack()
    solution = cp_exact(B, A, 12)
    torch.testing.assert_close(dense(solution), B @ A)


def test_degenerate_stacks_are_solved():
    B, A = stack(M=1)
    same = cp_als(B[:, :1].expand(-1, 4, -1, -1), A[:, :1].expand(-1, 4, -1, -1), 3)
    assert same.error.max() < 1e-6
    zero = cp_als(0 * B, A, 3)
    assert not zero.error.any()
    assert not zero.C.any()
    assert torch.isfinite(zero.U).all()


def test_rank_above_every_side_of_the_core():
    B, A = stack(K=4, m=3, n=2, r=2, M=1)
    solution = cp_als(B, A, 7, n_iter=200)
    assert solution.error.max() < 1e-4


def test_one_and_two_adapters():
    for K in (1, 2):
        B, A = stack(K=K, r=4, M=1)
        best = relative_error(cp_exact(B, A, 2), B, A)  # truncated SVDs of single slices
        assert cp_als(B, A, 2).error <= best + 1e-9


def test_an_extended_start_never_loses_fit():
    B, A = stack(K=6, r=4, m=24, n=24)
    small = cp_als(B, A, 4)
    large = cp_als(B, A, 9, n_starts=0, n_iter=0, start=extended(B, A, small, 9))
    assert (large.error < small.error).all()


def test_works_on_compressed_factors():
    B, A = stack(K=3, m=40, n=30, r=2, M=1)
    core = compress(list(B[0]), list(A[0]))
    found = cp_als(core.B[None], core.A[None], 4).error
    torch.testing.assert_close(found, cp_als(B, A, 4).error, atol=1e-4, rtol=0)
