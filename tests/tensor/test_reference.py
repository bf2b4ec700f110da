import subprocess
import sys

import numpy as np
import pytest
import tensorly
import torch
from tensorly.cp_tensor import cp_to_tensor

from tclora.tensor import CPFactors, cp_als, cp_parafac, factorise
from tests.tensor.test_cp import dense, planted, relative_error, stack
from tests.tensor.test_factorise import adapter

SOLVERS = {"als": cp_als, "tensorly": cp_parafac}
# On a random core, which has no low-rank structure, local optima differ by this much of the norm.
FIT = 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_planted_model_is_recovered_by_both_solvers(solver):
    B, A, U = planted(4)
    solution = SOLVERS[solver](B, A, 4, n_iter=500, tol=1e-12)
    assert solution.error.max() < 1e-4
    cosines = (solution.U[0].mT @ (U / U.norm(dim=0))).abs().max(0).values
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [3, 6])
def test_both_solvers_reach_the_same_fit_on_random_cores(rank):
    B, A = stack(K=5, m=15, n=14, r=3, M=3, seed=3)
    ours = cp_als(B, A, rank, n_iter=200, tol=1e-7).error
    theirs = cp_parafac(B, A, rank, n_iter=200, tol=1e-7).error
    torch.testing.assert_close(ours, theirs, atol=FIT, rtol=0)


def test_the_reference_follows_our_conventions_and_measures_the_true_error():
    B, A = stack(M=3)
    solution = cp_parafac(B, A, 5, n_starts=2, n_iter=20)
    torch.testing.assert_close(solution.error, relative_error(solution, B, A))
    for columns in (solution.U, solution.V):
        torch.testing.assert_close(columns.norm(dim=1), torch.ones(3, 5, dtype=torch.float64))
    assert (solution.C.sum(1) >= 0).all()
    assert (solution.C.norm(dim=1).diff(dim=1) <= 0).all()


def test_the_seed_alone_decides_the_reference():
    B, A = stack()
    torch.manual_seed(0)
    one = cp_parafac(B, A, 5, n_starts=3, n_iter=9, seed=4)
    torch.manual_seed(1)
    two = cp_parafac(B, A, 5, n_starts=3, n_iter=9, seed=4)
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.C, two.C)


def test_the_reference_leaves_a_zero_module_at_zero():
    B, A = stack(M=2)
    B[1] = 0
    solution = cp_parafac(B, A, 3, n_iter=9)
    assert solution.error[0] > 0
    assert solution.error[1] == 0
    assert not dense(solution)[1].any()


def test_the_reference_needs_a_start():
    with pytest.raises(ValueError, match="n_starts must be at least 1, got 0"):
        cp_parafac(*stack(), 3, n_starts=0)


def test_a_library_is_factorised_by_either_solver():
    adapters = [adapter(f"a{k}", seed=k, shared=1.0) for k in range(4)]
    ours, theirs = (factorise(adapters, 4, solver=solver) for solver in SOLVERS)
    assert theirs.explained_variance == pytest.approx(ours.explained_variance, abs=FIT)
    with pytest.raises(ValueError, match="solver must be one of als, tensorly, got 'svd'"):
        factorise(adapters, 4, solver="svd")


def test_factors_go_to_tensorly_and_back():
    adapters = [adapter(f"a{k}", seed=k, shared=1.0) for k in range(4)]
    cp = factorise(adapters, 4).modules["layers.0.up"]
    model = cp.to_tensorly()
    assert model.shape == (4, 30, 16)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        stack = cp_to_tensor(model)
    torch.testing.assert_close(stack, torch.einsum("kr,mr,nr->kmn", cp.C, cp.U, cp.V))
    again = CPFactors.from_tensorly(
        model, explained_variance=cp.explained_variance, energy=cp.energy
    )
    for part, wanted in zip(again, cp, strict=True):
        torch.testing.assert_close(part, wanted)


def test_any_cp_model_is_brought_to_our_conventions():
    rng = np.random.default_rng(0)
    C, U, V = (rng.normal(size=(d, 3)) for d in (4, 6, 5))
    weights = np.array([0.1, -20.0, 1.0])
    cp = CPFactors.from_tensorly((weights, [C, U, V]))
    stack = np.einsum("r,kr,mr,nr->kmn", weights, C, U, V)
    found = torch.einsum("kr,mr,nr->kmn", cp.C, cp.U, cp.V)
    torch.testing.assert_close(found, torch.from_numpy(stack))
    assert cp.energy == pytest.approx((stack**2).sum())
    assert cp.explained_variance == 1
    assert (cp.C.sum(0) >= 0).all()
    assert (cp.C.norm(dim=0).diff() <= 0).all()
    assert CPFactors.from_tensorly((None, [C, U, V])).rank == 3
    with pytest.raises(ValueError, match=r"three modes .* got 2"):
        CPFactors.from_tensorly((None, [C, U]))


def test_tensorly_is_imported_only_when_asked_for():
    code = "import sys, tclora.tensor; sys.exit('tensorly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
