"""The training engines side by side: same rows, steps and seeds, each in a process of its own.

SmolLM2-135M, one adapter of rank 16 on all linear layers per file of rows. The seconds include
loading the model, once per adapter in `separate`; memory is the process's peak. `separate` trains
its adapters one after the other in one process, so that its memory is that of one job. The engines
take turns, `separate` first.
Usage: ``python benchmarks/training.py FILE.jsonl FILE.jsonl ... [--steps N] [--rows N]
[--repeats N]``; a file holds rows with ``prompt`` and ``response``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from tables import report
from transformers import PreTrainedTokenizerBase

from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.model.base import Base, read_rows
from tclora.model.locate import load_tokenizer, locate_base_model
from tclora.model.tokens import encode_frame
from tclora.train.engines import AdapterRequest, train_adapters

ENGINES = ("separate", "together")


def train(engine: str, folder: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Train one adapter per Parquet file of the folder; return the figures."""
    base = Base(
        location=locate_base_model("smollm2-135m-instruct"),
        digest="smollm2-135m-instruct",
        dtype="float32",
        template="chat",
        max_tokens=512,
    )
    out = folder / engine
    requests = [
        AdapterRequest(
            name=file.stem, rows=file, target=out / file.stem, checkpoint=out / f"{file.stem}.part"
        )
        for file in sorted(folder.glob("*.parquet"))
    ]
    tokenizer = load_tokenizer(base.location)
    tokens = [_tokens(tokenizer, request.rows) for request in requests]
    config = AdapterConfig(max_steps=steps, batch_size=batch_size, epochs=1000)
    begin = time.perf_counter()
    cpu = time.process_time()
    results = train_adapters(
        engine=engine, base=base, requests=requests, config=config, checkpoint_steps=steps
    )
    seen = sum(
        count * steps * batch_size / len(pd.read_parquet(request.rows))
        for count, request in zip(tokens, requests, strict=True)
    )
    return {
        "seconds": time.perf_counter() - begin,
        "CPU seconds": time.process_time() - cpu,
        "tokens": seen,
        "peak (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "mean loss": sum(r.final_loss for r in results.values()) / len(results),
    }


def _tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> int:
    rows = encode_frame(tokenizer, read_rows(file), template="chat", max_tokens=512)
    return sum(map(len, rows))


def run(engine: str, folder: Path, steps: int, batch_size: int) -> dict[str, float | str]:
    """Run an engine in a process of its own; return its figures and the load before."""
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--one", engine, str(folder), str(steps), str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # this script
    figures = json.loads(done.stdout.splitlines()[-1])
    per_second = figures["tokens"] / figures["seconds"]
    return {"engine": engine, **figures, "tokens/s": per_second, "load before": load}


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


def main() -> None:
    """Write the rows, train them by both engines and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows per step and adapter")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    count = given.steps * given.rows
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in given.files:
            frame = pd.read_json(file, lines=True, nrows=count)[["prompt", "response"]]
            frame.astype(str).to_parquet(folder / f"{file.stem}.parquet")
        figures = [
            run(engine, folder, given.steps, given.rows)
            for _ in range(given.repeats)
            for engine in ENGINES
        ]
        apart = largest_difference(folder)
    report(
        "training",
        "Training engines side by side",
        pd.DataFrame(figures),
        f"K = {len(given.files)} adapters of rank 16, {given.steps} steps of {given.rows} rows "
        f"each, fp32. Largest difference between the engines' factors: {apart:.1e}.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, place, *numbers = sys.argv[2:]
        print(json.dumps(train(name, Path(place), *map(int, numbers))))
    else:
        main()
