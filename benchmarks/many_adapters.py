"""Many adapters of one 4096 × 4096 module, and growth with width and layers.

Each measurement runs in its own process.
"""

import json
import resource
import subprocess
import sys
import time

import pandas as pd
from libraries import draw_library
from tables import report

from tclora.tensor import factorise

R = 32


def measure(K: int, d: int, count: int) -> dict[str, float]:
    """Factorise `count` modules of size d × d jointly over K adapters."""
    adapters = draw_library({f"m{i}": (d, d) for i in range(count)}, K)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    factors = factorise(adapters, R, n_starts=1, n_iter=50)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "K": K,
        "d": d,
        "modules": count,
        "total rank": K * 16,
        "seconds": seconds,
        "MB above the factors": (after - before) / 1e3,
        "explained variance": factors.explained_variance,
    }


def main() -> None:
    """Run all sizes and report."""
    sizes = [(10, d, 4) for d in (1024, 2048, 4096, 8192)]
    sizes += [(10, 1024, count) for count in (16, 64)]
    sizes += [(K, 4096, 1) for K in (16, 64, 256)]
    rows = []
    for size in sizes:
        done = subprocess.run(  # this script itself
            [sys.executable, __file__, *map(str, size)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
    report(
        "many_adapters",
        "Joint CP against the number of adapters, width and modules",
        pd.DataFrame(rows),
        f"R = {R}, r = 16, one start, 50 sweeps. At K = 256 the total rank fills the module and "
        "the compression falls back to the identity.",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))))
    else:
        main()
