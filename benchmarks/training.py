"""The training engines, `transformers.Trainer` with PEFT, and their bound, side by side.

SmolLM2-135M, one adapter of rank 16 on all linear layers per file of rows; the same rows, steps and
precision for all, each way in a process of its own; they take turns. `separate` and the rival train
one adapter after the other in one process, so that their memory is that of one job.
Usage: ``python benchmarks/training.py FILE.jsonl FILE.jsonl ... [--steps N] [--rows N]
[--repeats N] [--dtype float32|bfloat16] [--name NAME]``; a file holds rows with ``prompt`` and
``response``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from tables import report
from training_ways import ENGINES, RIVAL, base_model, measure

from tclora.adapter import read_adapter
from tclora.evaluate.measure import measure as measure_rows
from tclora.model.attach import attached

HELD_OUT = 8  # rows per file that no adapter is trained on


def run(way: str, folder: Path, given: argparse.Namespace) -> dict[str, float | str]:
    """Measure a way in a process of its own; return its figures and the load before."""
    load = os.getloadavg()[0]
    numbers = (str(given.steps), str(given.rows), given.dtype)
    shutil.rmtree(folder / way, ignore_errors=True)  # a finished training would be resumed
    command = [sys.executable, __file__, "--one", way, str(folder), *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # this script
    return {"way": way, **json.loads(done.stdout.splitlines()[-1]), "load before": load}


def largest_difference(folder: Path) -> float:
    """Return the largest difference between the engines' factors."""
    names = sorted(file.stem for file in folder.glob("*.parquet"))
    return max(
        float((one - two).abs().max())
        for name in names
        for a, b in [[read_adapter(folder / engine / name).modules for engine in ENGINES]]
        for module in a
        for one, two in zip(a[module], b[module], strict=True)
    )


def held_out_loss(folder: Path, held: dict[str, pd.DataFrame], dtype: str) -> dict[str, float]:
    """Return the loss of each engine's adapters on their held-out rows, nats per token."""
    loaded = base_model(dtype).load()
    losses = {}
    for engine in ENGINES:
        found = []
        for name, rows in held.items():
            with attached(loaded.model, read_adapter(folder / engine / name)):
                found += measure_rows(loaded.model, loaded.tokenizer, loaded.encode(rows))
        losses[engine] = sum(row.nll for row in found) / sum(row.tokens for row in found)
    return losses


def compared(frame: pd.DataFrame, K: int) -> str:
    """Return what the ways' medians say about each other."""
    median = frame.groupby("way").median(numeric_only=True)
    rates = median["tokens/s"]
    memory = median["peak (MB)"]
    of_all = memory["together"] / (K * memory["separate"])
    parts = [f"memory of `together` over that of K processes {of_all:.2f}"]
    parts += [
        f"`{engine}` over `{RIVAL}` {rates[engine] / rates[RIVAL]:.2f}"
        for engine in ENGINES
        if RIVAL in rates
    ]
    return "; ".join(parts)


def main() -> None:
    """Write the rows, train them in every way and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows per step and adapter")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--name", default="training", help="of the table, before the precision")
    parser.add_argument("--no-rival", action="store_true", help="the engines alone")
    given = parser.parse_args()
    ways = ENGINES if given.no_rival else (*ENGINES, RIVAL)
    with tempfile.TemporaryDirectory() as scratch:
        folder, held = Path(scratch), {}
        for file in given.files:
            count = given.steps * given.rows
            frame = pd.read_json(file, lines=True, nrows=count + HELD_OUT)
            rows = frame[["prompt", "response"]].astype(str)
            rows[:count].to_parquet(folder / f"{file.stem}.parquet")
            held[file.stem] = rows[count:]
        figures = [run(way, folder, given) for _ in range(given.repeats) for way in ways]
        apart = largest_difference(folder)
        losses = held_out_loss(folder, held, given.dtype)
    frame = pd.DataFrame(figures)
    report(
        f"{given.name}_{given.dtype}",
        f"Training engines side by side ({given.dtype})",
        frame,
        f"K = {len(given.files)} adapters of rank 16, {given.steps} steps of {given.rows} rows "
        f"each. Largest difference between the engines' factors: {apart:.1e}; "
        f"loss on {HELD_OUT} other rows of each, nats per token: "
        f"{', '.join(f'`{engine}` {loss:.5f}' for engine, loss in losses.items())}; "
        f"{compared(frame, len(given.files))}.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, place, steps, rows, dtype = sys.argv[2:]
        print(json.dumps(measure(name, Path(place), int(steps), int(rows), dtype)))
    else:
        main()
