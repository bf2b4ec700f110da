"""Time and memory of the joint CP of one 4096 × 4096 module against TensorLy on the dense stack.

K = 10, r = 16, R = 16, 20 sweeps from the same start: plain ones on both sides, which reach the
same fit, and accelerated ones. Each side runs in its own process, so that its peak memory is its
own.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from libraries import draw_library
from tables import report

from tclora.adapter.union import module_factors
from tclora.tensor import compress, cp_als
from tclora.tensor.starts import slices

K, RANK, D, R, SWEEPS = 10, 16, 4096, 16, 20


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str) -> dict[str, float]:
    """Solve on one side; memory is counted above that of the factors and the libraries."""
    factors = module_factors(draw_library({"m": (D, D)}, K, RANK), "m")
    before = peak_bytes()
    begin = time.perf_counter()
    core = compress([f.B for f in factors], [f.A for f in factors])
    U, V = slices(core.B[None], core.A[None], R, torch.Generator().manual_seed(0))
    if side != "tensorly":
        solution = cp_als(
            core.B[None],
            core.A[None],
            R,
            n_starts=0,
            n_iter=SWEEPS,
            tol=0,
            start=(U, V),
            accelerate=side == "tclora, accelerated",
        )
        expanded = core.left @ solution.U[0], core.right @ solution.V[0]
        seconds = time.perf_counter() - begin
        assert expanded[0].shape == (D, R)  # noqa: S101
        error = float(solution.error[0])
    else:
        start = [np.ones((K, R)), (core.left @ U[0]).numpy(), (core.right @ V[0]).numpy()]
        seconds, error = dense_parafac([f.delta().numpy() for f in factors], start)
    return {"seconds": seconds, "error": error, "bytes": peak_bytes() - before}


def dense_parafac(updates: list[np.ndarray], start: list[np.ndarray]) -> tuple[float, float]:
    """Run TensorLy on the dense stack in single precision; building the stack is not timed.

    A sweep of TensorLy ends with V, one of tclora with the loadings: they are solved for once more,
    also untimed, so that both fits are of the same point.
    """
    import tensorly as tl
    from tensorly.decomposition import parafac

    stack = np.stack(updates).astype(np.float32)  # (K, d_out, d_in)
    init = tl.cp_tensor.CPTensor((np.ones(R, np.float32), [s.astype(np.float32) for s in start]))
    begin = time.perf_counter()
    _, (_, U, V) = parafac(stack, R, n_iter_max=SWEEPS, init=init, tol=0)
    seconds = time.perf_counter() - begin
    products = np.stack([((U.T @ x) * V.T).sum(1, dtype=np.float64) for x in stack])  # (K, R)
    C = np.linalg.solve((U.T @ U) * (V.T @ V).astype(np.float64), products.T).T
    squared = sum(
        float(np.square(x - ((U * c) @ V.T)).sum(dtype=np.float64))
        for x, c in zip(stack, C, strict=True)
    )
    return seconds, (squared / float(np.square(stack, dtype=np.float64).sum())) ** 0.5


def main() -> None:
    """Run both sides and report."""
    rows = []
    for side in ("tclora", "tclora, accelerated", "tensorly"):
        done = subprocess.run(  # this script itself
            [sys.executable, __file__, side], capture_output=True, text=True, check=True
        )
        rows.append({"": side, **json.loads(done.stdout)})
    ours, _, theirs = rows
    ratios = {key: theirs[key] / ours[key] for key in ("seconds", "bytes")}
    rows.append({"": "tensorly / tclora", **ratios, "error": theirs["error"] / ours["error"]})
    difference = theirs["error"] - ours["error"]
    report(
        "cp_speed",
        "Joint CP of one module of 4096 by 4096",
        pd.DataFrame(rows),
        f"K = {K}, r = {RANK}, R = {R}, {SWEEPS} sweeps from the same start. `seconds` includes "
        "compression, the start and expansion for tclora, and `parafac` alone for TensorLy (dense "
        "single-precision stack); `error` is the residual's relative norm; `bytes` is peak memory "
        f"above the factors. At equal sweeps the errors differ by {difference:.1e}.",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
