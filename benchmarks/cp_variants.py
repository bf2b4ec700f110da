"""What else the joint factorisation could be, measured on a finished run's adapters.

1. Solver: accelerated ALS (ours), plain ALS and damped Gauss-Newton (Levenberg-Marquardt) from the
   same start, in equal time.
2. Coupling: one C for all modules of one shape, and a 4-way tensor whose U and V serve all layers,
   against a CP of each module alone.
3. Fit over seeds and core consistency by CP rank.

Usage: ``python benchmarks/cp_variants.py LIBRARY``.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from held_out import cluster_adapters
from tables import report
from torch import Tensor

from tclora.adapter import Adapter, read_adapter
from tclora.adapter.union import module_factors
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.tensor import Core, compress, core_consistency, cp_als
from tclora.tensor.starts import slices

R = 16
SAMPLE = 12  # modules
SEEDS = 5


def core_of(adapters: Sequence[Adapter], module: str) -> Core:
    """Compress one module's updates."""
    factors = [f.__class__(f.B.double(), f.A.double()) for f in module_factors(adapters, module)]
    return compress([f.B for f in factors], [f.A for f in factors])


def relative_error(X: Tensor, U: Tensor, V: Tensor, C: Tensor) -> float:
    """Return ‖𝒳 − fit‖ / ‖𝒳‖ of a stack X (K, m, n)."""
    return float((X - torch.einsum("kr,mr,nr->kmn", C, U, V)).norm() / X.norm())


def gauss_newton(X: Tensor, U: Tensor, V: Tensor, budget: float) -> float:
    """Levenberg-Marquardt on all factors at once, dense normal equations, until time is over."""
    (K, m, n), R = X.shape, U.shape[1]
    C = torch.linalg.lstsq(
        torch.einsum("mr,nr->mnr", U, V).reshape(m * n, R), X.reshape(K, -1).T
    ).solution.T
    damping, best = 1e-2, relative_error(X, U, V, C)
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget:
        residual = X - torch.einsum("kr,mr,nr->kmn", C, U, V)
        gradient = torch.cat(
            [
                torch.einsum("kmn,mr,nr->kr", residual, U, V).flatten(),
                torch.einsum("kmn,kr,nr->mr", residual, C, V).flatten(),
                torch.einsum("kmn,kr,mr->nr", residual, C, U).flatten(),
            ]
        )
        normal = _normal_matrix([C, U, V])
        step = torch.linalg.solve(
            normal + damping * torch.diag(normal.diagonal().clamp_min(1e-12)), gradient
        )
        dC, dU, dV = (part.reshape(-1, R) for part in step.split([K * R, m * R, n * R]))
        error = relative_error(X, U + dU, V + dV, C + dC)
        if error < best:
            C, U, V, best, damping = C + dC, U + dU, V + dV, error, damping / 3
        else:
            damping *= 4
    return best


def _normal_matrix(factors: Sequence[Tensor]) -> Tensor:
    """Return JᵀJ of the CP model in the unknowns of all factors, rows first."""
    grams = [factor.T @ factor for factor in factors]
    sizes = [factor.numel() for factor in factors]
    R = factors[0].shape[1]
    rows = []
    for i, left in enumerate(factors):
        row = []
        for j, right in enumerate(factors):
            others = [g for k, g in enumerate(grams) if k not in {i, j}]
            weight = torch.ones_like(grams[0])
            for gram in others:
                weight = weight * gram
            if i == j:
                block = torch.kron(torch.eye(left.shape[0], dtype=left.dtype), weight)
            else:  # d/d left[a, r] and d/d right[b, s]: left[a, s] right[b, r] weight[r, s]
                block = torch.einsum("as,br,rs->arbs", left, right, weight).reshape(
                    sizes[i], sizes[j]
                )
            row.append(block)
        rows.append(torch.cat(row, dim=1))
    assert rows[0].shape[0] == sizes[0] == factors[0].shape[0] * R  # noqa: S101
    return torch.cat(rows)


def solvers(cores: dict[str, Core]) -> pd.DataFrame:
    """Compare solvers from one start in the time that 100 accelerated sweeps take."""
    rows = []
    for module, core in cores.items():
        B, A, X = core.B[None], core.A[None], core.B @ core.A
        start = slices(B, A, R, torch.Generator().manual_seed(0))
        begin = time.perf_counter()
        fast = cp_als(B, A, R, n_starts=0, n_iter=100, tol=0, start=start)
        budget = time.perf_counter() - begin
        plain = cp_als(B, A, R, n_starts=0, n_iter=100, tol=0, start=start, accelerate=False)
        full = cp_als(B, A, R, n_iter=200)
        rows.append(
            {
                "module": module,
                "accelerated ALS": float(fast.error),
                "plain ALS": float(plain.error),
                "Gauss-Newton, same time": gauss_newton(X, start[0][0], start[1][0], budget),
                "Gauss-Newton, 30 x the time": gauss_newton(
                    X, start[0][0], start[1][0], 30 * budget
                ),
                "ours as shipped": float(full.error),
            }
        )
    return pd.DataFrame(rows)


def coupled(stacks: Sequence[Tensor], sweeps: int = 60) -> float:
    """Explained variance of one C for all modules: U and V of each module, C over all, by ALS."""
    K = stacks[0].shape[0]
    generator = torch.Generator().manual_seed(0)
    factors = [
        slices(X[None], torch.eye(X.shape[2], dtype=X.dtype).expand(1, K, -1, -1), R, generator)
        for X in stacks
    ]
    U, V = [u[0] for u, _ in factors], [v[0] for _, v in factors]
    C = torch.ones(K, R, dtype=stacks[0].dtype)
    for _ in range(sweeps):
        gram = sum((u.T @ u) * (v.T @ v) for u, v in zip(U, V, strict=True))
        target = sum(
            torch.einsum("kmn,mr,nr->kr", X, u, v) for X, u, v in zip(stacks, U, V, strict=True)
        )
        C = torch.linalg.lstsq(gram, target.T).solution.T
        for i, X in enumerate(stacks):
            weight = (V[i].T @ V[i]) * (C.T @ C)
            U[i] = torch.linalg.lstsq(weight, torch.einsum("kmn,nr,kr->rm", X, V[i], C)).solution.T
            weight = (U[i].T @ U[i]) * (C.T @ C)
            V[i] = torch.linalg.lstsq(weight, torch.einsum("kmn,mr,kr->rn", X, U[i], C)).solution.T
    lost = sum(
        float((X - torch.einsum("kr,mr,nr->kmn", C, u, v)).square().sum())
        for X, u, v in zip(stacks, U, V, strict=True)
    )
    return 1 - lost / sum(float(X.square().sum()) for X in stacks)


def four_way(stack: Tensor, rank: int, sweeps: int = 40) -> float:
    """Explained variance of a 4-way tensor (layer, k, d_out, d_in) at a CP rank, by plain ALS."""
    generator = torch.Generator().manual_seed(0)
    L, C, U, V = (torch.randn(n, rank, generator=generator) for n in stack.shape)

    def solved(target: Tensor, *others: Tensor) -> Tensor:
        gram = torch.stack([factor.T @ factor for factor in others]).prod(0)
        return target @ torch.linalg.pinv(gram, rtol=1e-6, hermitian=True)

    for _ in range(sweeps):
        by_output = stack.mT @ U  # (layer, k, d_in, R)
        V = solved(torch.einsum("lknr,lr,kr->nr", by_output, L, C), L, C, U)
        by_input = stack @ V  # (layer, k, d_out, R)
        U = solved(torch.einsum("lkmr,lr,kr->mr", by_input, L, C), L, C, V)
        both = torch.einsum("lkmr,mr->lkr", by_input, U)
        C = solved(torch.einsum("lkr,lr->kr", both, L), L, U, V)
        L = solved(torch.einsum("lkr,kr->lr", both, C), C, U, V)
    kept = 2 * (both * L[:, None] * C).sum()
    fit = torch.stack([factor.T @ factor for factor in (L, C, U, V)]).prod(0).sum()
    return float((kept - fit) / stack.square().sum())


def coupling(adapters: Sequence[Adapter]) -> pd.DataFrame:
    """Compare joint variants on the query projections of all layers."""
    modules = [m for m in adapters[0].modules if m.endswith("self_attn.q_proj")]
    cores = [core_of(adapters, module) for module in modules]
    stacks = [core.B @ core.A for core in cores]
    energy = sum(float(X.square().sum()) for X in stacks)

    def alone(rank: int) -> float:
        """Explained variance of a CP of each module at a rank."""
        fits = [cp_als(c.B[None], c.A[None], rank, n_iter=200) for c in cores]
        kept = sum(
            float(X.square().sum()) * (1 - float(s.error) ** 2)
            for X, s in zip(stacks, fits, strict=True)
        )
        return kept / energy

    K, layers = len(adapters), len(modules)
    d_out, d_in = adapters[0].modules[modules[0]].shape
    rows: list[tuple[str, int, float, int]] = [
        ("each module alone", rank, alone(rank), layers * rank * (d_out + d_in + K))
        for rank in (4, R)
    ]
    rows += [
        ("one C for all modules", R, coupled(stacks), layers * R * (d_out + d_in) + K * R),
    ]
    dense = torch.stack(
        [(c.left @ (X @ c.right.T)).float() for c, X in zip(cores, stacks, strict=True)]
    )
    for rank in (16, 128):
        numbers = rank * (d_out + d_in + K + layers)
        rows.append(("4-way, U and V for all layers", rank, four_way(dense, rank), numbers))
    return pd.DataFrame(rows, columns=["variant", "R", "explained variance", "numbers"])


def stability(cores: dict[str, Core]) -> pd.DataFrame:
    """Fit over seeds and core consistency by CP rank, means over modules."""
    rows = []
    for rank in (2, 4, 8, 16, 32):
        spread, consistency, explained = [], [], []
        for core in cores.values():
            B, A = core.B[None], core.A[None]
            fits = [cp_als(B, A, rank, n_iter=200, seed=seed) for seed in range(SEEDS)]
            errors = torch.stack([fit.error for fit in fits])
            spread.append(float((errors.max() - errors.min()) / errors.min()))
            best = fits[0]
            consistency.append(float(core_consistency(B, A, best)))
            explained.append(1 - float(best.error) ** 2)
        n = len(cores)
        rows.append((rank, sum(explained) / n, max(spread), sum(consistency) / n))
    columns = ["R", "explained variance", f"largest spread of error over {SEEDS} seeds",
               "core consistency (%)"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def main(library: Path) -> None:
    """Run all three and report."""
    names = cluster_adapters(read_manifest(library).training)
    adapters = [read_adapter(Layout(library).adapter(name)) for name in names]
    modules = list(adapters[0].modules)
    sample = modules[:: len(modules) // SAMPLE][:SAMPLE]
    cores = {module.removeprefix("model.layers."): core_of(adapters, module) for module in sample}
    note = f"{library.name}: {len(adapters)} adapters of rank 16, CP rank {R}."
    table = solvers(cores)
    means = {"module": "mean", **table.drop(columns="module").mean().to_dict()}
    table = pd.concat([table, pd.DataFrame([means])])
    report("cp_solvers", "Relative error by solver, same start", table, note)
    report("cp_stability", "Fit over seeds and core consistency", stability(cores), note)
    report("cp_coupling", "Joint variants of the factorisation", coupling(adapters), note)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
