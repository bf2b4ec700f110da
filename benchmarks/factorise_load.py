"""The joint factorisation of a library on a quiet machine and beside a busy process.

Usage: ``python benchmarks/factorise_load.py LIBRARY [RANK]``, such as ``runs/demo/library``.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from tables import report

from tclora.adapter import read_adapter
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import cluster_name
from tclora.tensor import factorise

REPEATS = 2


def measure(library: Path, rank: int) -> dict[str, float]:
    """Factorise in this process."""
    names = map(cluster_name, range(read_manifest(library).clustering.k))
    adapters = [read_adapter(Layout(library).adapter(name)) for name in names]
    begin, cpu = time.perf_counter(), time.process_time()
    factors = factorise(adapters, rank)
    return {
        "seconds": time.perf_counter() - begin,
        "CPU seconds": time.process_time() - cpu,
        "explained variance": factors.explained_variance,
    }


def _busy() -> None:
    """Multiply matrices on one thread until killed."""
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while True:
        a @ a


def main() -> None:
    """Take turns with and without a busy process beside, and report."""
    library, rank = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    figures = []
    for beside in (False, True) * REPEATS:
        load = os.getloadavg()[0]
        busy = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True)
        if beside:
            busy.start()
        command = [sys.executable, __file__, "--one", str(library), str(rank)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # this script
        if beside:
            busy.kill()
        found = json.loads(done.stdout.splitlines()[-1])
        figures.append({"beside a busy process": beside, **found, "load before": load})
    report(
        "factorise_load",
        "Joint factorisation beside a busy process",
        pd.DataFrame(figures),
        f"CP rank {rank}, {os.cpu_count()} cores; the busy process multiplies matrices on one.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
