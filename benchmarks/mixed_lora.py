"""Ways to pass each row of a batch through its own LoRA factors: forward and backward.

Stacked: one product with the factors of all adapters, other adapters' components masked out.
Gathered: each row's factors, batched products. Slices: one product per adapter
(`tclora.train.mixed`). Variants take turns on one batch of 16 rows × 64 tokens, rank 16; medians,
in relation to the slices. The frozen product of the module itself shows what share the update has.
Usage: ``python benchmarks/mixed_lora.py [REPEATS]``.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from tables import report
from torch import Tensor, nn

from tclora.train.mixed import _Update

ROWS, TOKENS, R, SCALING = 16, 64, 16, 2.0
SHAPES = [(48, 32), (576, 576), (1536, 576), (576, 1536)]  # (d_out, d_in): tiny, SmolLM2


def variants(K: int, d_out: int, d_in: int) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to add the update to a copy of the module's output."""
    x = torch.randn(ROWS, TOKENS, d_in, requires_grad=True)
    output, W = torch.randn(ROWS, TOKENS, d_out), torch.randn(d_out, d_in)
    owner = torch.arange(ROWS) * K // ROWS
    A = nn.Parameter(torch.randn(K, R, d_in))
    B = nn.Parameter(torch.randn(K, d_out, R))
    As, Bs = ([nn.Parameter(part.clone()) for part in factor.detach()] for factor in (A, B))
    own, counts = (part.tolist() for part in owner.unique_consecutive(return_counts=True))
    ends = [TOKENS * end for end in itertools.accumulate(counts)]
    spans = list(zip([0, *ends], ends, strict=False))
    chosen = [*(As[k] for k in own), *(Bs[k] for k in own)]
    mask = (torch.arange(K) == owner[:, None]).float().repeat_interleave(R, 1)[:, None]

    def stacked() -> Tensor:
        h = (x @ A.view(K * R, d_in).mT) * mask  # (n, T, K r)
        return output + h @ B.permute(1, 0, 2).reshape(d_out, K * R).mT * SCALING

    def gathered() -> Tensor:
        return output + torch.bmm(torch.bmm(x, A[owner].mT), B[owner].mT) * SCALING

    def slices() -> Tensor:
        return _Update.apply(output.clone(), x, SCALING, (spans, spans), *chosen)

    def module() -> Tensor:
        return x @ W.mT

    return {"stacked": stacked, "gathered": gathered, "slices": slices, "module": module}


def measure(K: int, d_out: int, d_in: int, repeats: int) -> dict[str, float | int]:
    """Return the slices' milliseconds and the others' in relation to them."""
    ways = variants(K, d_out, d_in)
    upstream = torch.randn(ROWS, TOKENS, d_out)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, forward in ways.items():
            begin = time.perf_counter()
            forward().backward(upstream)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    own = medians.pop("slices")
    ratios = {f"{name} / slices": value / own for name, value in medians.items()}
    return {"d_out": d_out, "d_in": d_in, "K r": K * R, "slices (ms)": own * 1e3, **ratios}


def main() -> None:
    """Measure all sizes and report."""
    torch.manual_seed(0)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    rows = [measure(K, *shape, repeats) for shape in SHAPES for K in (1, 3, 7, 16)]
    report(
        "mixed_lora",
        "Each row through its own LoRA factors, forward and backward",
        pd.DataFrame(rows),
        f"{ROWS} rows of {TOKENS} tokens, r = {R}, fp32; medians of {repeats}.",
    )


if __name__ == "__main__":
    main()
