"""A Mistral-7B-shaped library on disk → one merged adapter on disk: seconds and peak memory.

32 layers × q, k, v, o, gate, up, down; K = 10, r = 16, bf16 safetensors. Each method runs in its
own process. Usage: ``python benchmarks/large_library.py [METHOD …]``.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from libraries import MISTRAL_7B, layers, write_library
from tables import report

from tclora.adapter import read_adapter, write_adapter
from tclora.merge import merge

K, LAYERS = 10, 32
METHODS = ("tc-lora-mean", "uniform", "svd", "knots-ties", "tsv-m", "iso-c", "core-space", "wudi")
CP_RANK = 32


def measure(folder: Path, method: str) -> dict[str, object]:
    """Merge by one method, from disk to disk."""
    begin = time.perf_counter()
    adapters = [read_adapter(path) for path in write_library(folder, layers(MISTRAL_7B, LAYERS), K)]
    merged = merge(adapters, method, rank=CP_RANK if method.startswith("tc-lora") else None)
    merging = time.perf_counter() - begin
    write_adapter(merged.adapter, folder / "result")
    return {
        "method": method,
        "rank": merged.rank,
        "merge s": merging,
        "with writing s": time.perf_counter() - begin,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "result GB": merged.parameters * 4 / 1e9,
    }


def main(methods: tuple[str, ...]) -> None:
    """Run every method and report."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_library(Path(folder), layers(MISTRAL_7B, LAYERS), K)
        for method in methods:
            done = subprocess.run(  # this script itself
                [sys.executable, __file__, "--one", folder, method],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rows.append(json.loads(done.stdout))
    report(
        "large_library",
        "Merging a Mistral-7B-shaped library",
        pd.DataFrame(rows),
        f"{LAYERS} layers of 7 modules, K = {K}, r = 16, bf16 on disk; joint CP at R = {CP_RANK}, "
        "all others at their own rank. Peak memory is that of the whole process.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main(tuple(sys.argv[1:]) or METHODS)
