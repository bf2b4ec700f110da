"""Embedding prompts: plain `SentenceTransformer.encode` beside what a run does.

The same prompts by the built-in model on this machine, every way in a process of its own; they take
turns. Seconds are without imports and loading; those of several processes have their start.
Usage: ``python benchmarks/embedding.py FILE.jsonl ... [--rows N]``, rows per file, with ``prompt``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tables import report

from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder

PLAIN, OURS, PROCESSES = "encode", "tclora", "encode, a process per core"
WAYS = (PLAIN, OURS, PROCESSES)
REPEATS = 2


def measure(way: str, prompts: list[str], target: Path) -> dict[str, float]:
    """Embed in this process, keep the vectors; return the figures."""
    model = load_embedder(locate_embedder(BUILTIN_EMBEDDER))
    embed_prompts(model, prompts[:8])
    begin = time.perf_counter()
    if way == OURS:
        vectors = embed_prompts(model, prompts)
    else:
        devices = ["cpu"] * (os.cpu_count() or 1) if way == PROCESSES else None
        vectors = model.encode(prompts, normalize_embeddings=True, device=devices)
    seconds = time.perf_counter() - begin
    np.save(target, vectors)
    return {"seconds": seconds, "prompts/s": len(prompts) / seconds}


def main() -> None:
    """Take turns and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=92)
    parser.add_argument("--one", nargs=2, help="way and file of vectors: measure it here")
    given = parser.parse_args()
    frames = [pd.read_json(file, lines=True, nrows=given.rows) for file in given.files]
    prompts = pd.concat(frames)["prompt"].astype(str).tolist()
    if given.one:
        print(json.dumps(measure(given.one[0], prompts, Path(given.one[1]))))
        return
    figures, vectors = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS * REPEATS:
            load, target = os.getloadavg()[0], Path(scratch) / "vectors.npy"
            command = [sys.executable, __file__, *map(str, given.files), "--rows", str(given.rows)]
            command += ["--one", way, str(target)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # ours
            vectors[way] = np.load(target)
            apart = float(np.abs(vectors[way] - vectors[PLAIN]).max())
            found = json.loads(done.stdout.splitlines()[-1])
            figures.append({"way": way, **found, "largest difference": apart, "load before": load})
    frame = pd.DataFrame(figures)
    median = frame.groupby("way")["seconds"].median()
    ratios = "; ".join(f"{way}: {median[PLAIN] / median[way]:.2f}" for way in WAYS[1:])
    report(
        "embedding",
        "Embedding prompts",
        frame,
        f"{len(prompts)} prompts, all-MiniLM-L6-v2, fp32, {os.cpu_count()} cores. "
        f"Times as fast as plain encode: {ratios}.",
    )


if __name__ == "__main__":
    main()
