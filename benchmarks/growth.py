"""How the time of a merge grows with the width of the modules and with their number.

Square modules, K = 10, r = 16, bf16 as stored; a line of slope 1 is linear. Table and picture.
Usage: ``python benchmarks/growth.py``.
"""

import time

import pandas as pd
import torch
from libraries import draw_library
from matplotlib.figure import Figure
from tables import RESULTS, report

from tclora.merge import merge

K = 10
METHODS = ("tc-lora-mean", "uniform", "svd", "knots-ties", "tsv-m", "iso-c")
WIDTHS, MODULES = (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)
FIXED_WIDTH, FIXED_MODULES = 2048, 2


def seconds(method: str, width: int, modules: int) -> float:
    """Time one merge, the better of two."""
    shapes = {f"m{i}": (width, width) for i in range(modules)}
    library = draw_library(shapes, K, dtype=torch.bfloat16)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        merge(library, method, rank=32 if method.startswith("tc-lora") else None)
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Measure, print and draw."""
    rows = []
    for method in METHODS:
        for width in WIDTHS:
            rows.append(("width", method, width, seconds(method, width, FIXED_MODULES)))
        for modules in MODULES:
            rows.append(("modules", method, modules, seconds(method, FIXED_WIDTH, modules)))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows, columns=["grows", "method", "value", "seconds"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (grows, part) in zip(figure.subplots(1, 2), table.groupby("grows"), strict=True):
        for method, line in part.groupby("method", sort=False):
            axes.loglog(line["value"], line["seconds"], "o-", label=method, ms=3)
        least = part["value"].min()
        axes.loglog(
            [least, part["value"].max()],
            [part["seconds"].min(), part["seconds"].min() * part["value"].max() / least],
            "k--", lw=0.8, label="linear",
        )  # fmt: skip
        axes.set(xlabel=f"{grows}", ylabel="seconds")
        axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "growth.svg", metadata={"Date": None})
    wide = table.pivot(index=["grows", "value"], columns="method", values="seconds")
    report(
        "growth",
        "Seconds of a merge by width and number of modules",
        wide[list(METHODS)].reset_index(),
        f"K = {K}, r = 16; width at {FIXED_MODULES} modules, modules at width {FIXED_WIDTH}; joint "
        "CP at R = 32. Picture: growth.svg.",
    )


if __name__ == "__main__":
    main()
