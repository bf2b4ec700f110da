"""Ways to pass each row of a part through its own LoRA factors: forward and backward.

Slices: one product per adapter. Stacked: one product with the factors of all adapters, other
adapters' components masked out (both `tclora.train.updates`). Gathered: each row's factors, batched
products. Grouped: torch's grouped product over the adapters' rows, on a GPU. Variants take turns on
one part, rank 16: on a CPU 16 rows x 64 tokens in fp32, on a GPU 160 x 150 in bf16; medians, in
relation to the slices. The frozen product of the module itself shows what share the update has.
Usage: ``python benchmarks/mixed_lora.py [REPEATS]``.
"""

import statistics
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from tables import report
from torch import Tensor, nn

from tclora.train.updates import Ownership, Updates, add_updates

GPU = torch.cuda.is_available()
DEVICE, KIND = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
ROWS, TOKENS = (160, 150) if GPU else (16, 64)
R, SCALING = 16, 2.0
SHAPES = [(576, 576), (1536, 576), (576, 1536)]  # (d_out, d_in): SmolLM2
SHAPES = [*SHAPES, (4096, 4096), (11008, 4096)] if GPU else [(48, 32), *SHAPES]


def variants(K: int, d_out: int, d_in: int) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to add the update to a copy of the module's output."""
    place = {"device": DEVICE, "dtype": KIND}
    x = torch.randn(ROWS, TOKENS, d_in, **place, requires_grad=True)
    output, W = torch.randn(ROWS, TOKENS, d_out, **place), torch.randn(d_out, d_in, **place)
    owner = torch.arange(ROWS, device=DEVICE) * K // ROWS
    A = nn.Parameter(torch.randn(K, R, d_in, **place))
    B = nn.Parameter(torch.randn(K, d_out, R, **place))
    As, Bs = ([nn.Parameter(part.clone()) for part in factor.detach()] for factor in (A, B))
    updates = Updates.of("module", As, Bs, SCALING)
    lengths = [TOKENS] * ROWS
    ends = (owner.bincount() * TOKENS).cumsum(0).int()

    def update(stacked: bool) -> Callable[[], Tensor]:
        part = Ownership.of(owner.tolist(), lengths, updates.size, x.device if stacked else None)
        return lambda: add_updates(output.clone(), x, updates, part, x)

    def gathered() -> Tensor:
        return output + torch.bmm(torch.bmm(x, A[owner].mT), B[owner].mT) * SCALING

    def grouped() -> Tensor:
        h = nn.functional.grouped_mm(x.view(-1, d_in), A.mT, offs=ends)
        return output + nn.functional.grouped_mm(h, B.mT, offs=ends).view_as(output) * SCALING

    def module() -> Tensor:
        return x @ W.mT

    ways = {"slices": update(False), "stacked": update(True), "gathered": gathered}
    return ways | ({"grouped": grouped} if GPU else {}) | {"module": module}


def measure(K: int, d_out: int, d_in: int, repeats: int) -> dict[str, float | int]:
    """Return the slices' milliseconds and the others' in relation to them."""
    ways = variants(K, d_out, d_in)
    upstream = torch.randn(ROWS, TOKENS, d_out, device=DEVICE, dtype=KIND)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, forward in ways.items():
            begin = time.perf_counter()
            forward().backward(upstream)
            if GPU:
                torch.cuda.synchronize()
            if repeat:  # the first prepares
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
        "mixed_lora_gpu" if GPU else "mixed_lora",
        "Each row through its own LoRA factors, forward and backward",
        pd.DataFrame(rows),
        f"{ROWS} rows of {TOKENS} tokens, r = {R}, {KIND}; medians of {repeats}"
        f"{', ' + torch.cuda.get_device_name() if GPU else ''}.",
    )


if __name__ == "__main__":
    main()
