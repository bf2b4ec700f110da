"""The loss of sample rows under an adapter: padded side by side, and packed as calibrations do.

Usage: ``python benchmarks/sample_loss.py LIBRARY [ROWS]``, a finished run and rows per cluster.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from held_out import Opened
from tables import report

from tclora.model.attach import attached
from tclora.model.cluster_loss import ClusterLoss
from tclora.model.loss import response_nll
from tclora.model.tokens import batches, encode_frame

BUDGET, REPEATS = 2048, 3


def main(library: Path, count: int) -> None:
    """Take turns, and report the best time of each way."""
    bench = Opened(library)
    adapter, told = bench.adapters[0], bench.manifest.settings.train
    rows = {
        other.name: encode_frame(
            bench.tokenizer, pd.read_parquet(bench.layout.rows(other.name)).head(count),
            template=told.template, max_tokens=told.max_tokens,
        )
        for other in bench.adapters
    }  # fmt: skip

    @torch.no_grad()
    def padded() -> float:
        means = []
        with attached(bench.model, adapter):
            for part in rows.values():
                made = list(batches(part, pad_id=bench.tokenizer.pad_token_id, token_budget=BUDGET))
                total = sum(float(response_nll(bench.model, batch).sum()) for batch in made)
                means.append(total / sum(batch.supervised for batch in made))
        return sum(means) / len(means)

    loss = ClusterLoss(bench.model, rows, adapter.modules, token_budget=BUDGET)
    ways: dict[str, Callable[[], float]] = {
        "padded": padded, "packed": lambda: loss.mean(adapter),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found = {}
    for _ in range(REPEATS):
        for way, measured in ways.items():
            begin = time.process_time()
            found[way] = measured()
            seconds[way].append(time.process_time() - begin)
    best = {way: min(times) for way, times in seconds.items()}
    tokens = sum(len(row) for part in rows.values() for row in part)
    figures = [
        {
            "way": way, "loss": found[way], "CPU seconds": best[way],
            "tokens per CPU second": tokens / best[way], "times padded": best[way] / best["padded"],
        }
        for way in ways
    ]  # fmt: skip
    report(
        "sample_loss",
        "The loss of sample rows under one adapter",
        pd.DataFrame(figures),
        f"{count} rows of each of {len(rows)} clusters of {library.name}, {tokens} tokens, at most "
        f"{BUDGET} per forward pass; the least of {REPEATS} times.",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4)
