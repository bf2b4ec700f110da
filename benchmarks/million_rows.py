"""A million rows through read, tokenise, embed, cluster and divide: time, memory, their growth.

Rows and embeddings are made here: prompts of some 150 characters from ten kinds of task, with
vectors around ten directions (D = 384, given through ``embed.vectors``, so that no model embeds).
Each size runs ``tclora run --until prepare`` from the command line: rows are read twice, once to
check them before anything starts. One row in 100 000 is bad and must be reported with its number.
Usage: ``python benchmarks/million_rows.py [--rows 100000 300000 1000000] [--form jsonl]
[--folder FOLDER]``; a million rows need 4 GB of disk in the folder.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tables import report

KINDS, WIDTH, BLOCK = 10, 384, 20_000
BAD = 100_000  # one bad row in so many
WORDS = [f"{a}{b}" for a in ("re", "un", "pre", "out", "over") for b in ("turn", "make", "see")]


def blocks(rows: int) -> Iterator[pd.DataFrame]:
    """Yield the rows, some at a time: prompt, response, task and embedding."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((KINDS, WIDTH)).astype(np.float32)
    for start in range(0, rows, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, rows))
        kinds = rng.integers(0, KINDS, len(numbers))
        words = rng.choice(WORDS, (len(numbers), 16))
        vectors = centres[kinds] + rng.standard_normal((len(numbers), WIDTH)).astype(np.float32)
        yield pd.DataFrame(
            {
                "prompt": [
                    f"Task {k}, question {n}: {' '.join(w)}?"
                    for k, n, w in zip(kinds, numbers, words, strict=True)
                ],
                "response": [
                    "" if n % BAD == BAD // 2 else f"Answer {n}: {' '.join(w[:4])}."
                    for n, w in zip(numbers, words, strict=True)
                ],
                "task": [f"kind {k}" for k in kinds],
                "embedding": list(vectors),
            }
        )


def write(rows: int, form: str, folder: Path) -> tuple[Path, Path]:
    """Write rows and embeddings; return their files."""
    file, vectors = folder / f"rows.{form}", folder / "vectors.parquet"
    schema = pa.schema({"prompt": pa.string(), "embedding": pa.list_(pa.float32())})
    with pq.ParquetWriter(vectors, schema) as embeddings, file.open("wb") as lines:
        table: pq.ParquetWriter | None = None
        for block in blocks(rows):
            pair = pa.Table.from_pandas(
                block[["prompt", "embedding"]], schema, preserve_index=False
            )
            embeddings.write_table(pair)
            texts = block.drop(columns="embedding")
            if form == "jsonl":
                lines.write(texts.to_json(orient="records", lines=True).encode())
                continue
            made = pa.Table.from_pandas(texts, preserve_index=False)
            table = table or pq.ParquetWriter(lines, made.schema)
            table.write_table(made)
        if table:
            table.close()
    return file, vectors


class Memory(threading.Thread):
    """Watches the resident memory of a process and of all its children (bytes)."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.own = self.whole = 0
        self._process = process

    def run(self) -> None:
        """Look five times a second until the process ends."""
        while True:
            try:
                own = self._process.memory_info().rss
                children = sum(
                    child.memory_info().rss for child in self._process.children(recursive=True)
                )
            except psutil.NoSuchProcess:
                if not psutil.pid_exists(self._process.pid):
                    return
                continue  # a child ended while it was looked at
            self.own, self.whole = max(self.own, own), max(self.whole, own + children)
            if self._process.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.2)


def prepare(rows: int, form: str, folder: Path) -> dict[str, float | str]:
    """Run one size; return its figures."""
    file, vectors = write(rows, form, folder)
    settings = {
        "name": "rows",
        "output": str(folder / "runs"),
        "data": {"path": str(file), "on_bad_row": "skip"},
        "embed": {"vectors": str(vectors)},
        "cluster": {"k": KINDS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "tclora_cli", "run", str(folder / "config.yaml")]
    begin, before = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--until", "prepare"], stdout=log, stderr=log)
        memory = Memory(psutil.Process(process.pid))
        memory.start()
        if process.wait():
            raise RuntimeError((folder / "log").read_text()[-2000:])
    seconds = time.perf_counter() - begin
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    memory.join()
    reported = (folder / "log").read_text().count("left out:")
    staging = folder / "runs" / ".rows.staging"
    clusters = pd.read_parquet(next(staging.glob("clusters*")), columns=["task", "cluster"])
    pure = clusters.groupby("task")["cluster"].nunique().eq(1).all()
    return {
        "rows": rows,
        "form": form,
        "seconds": seconds,
        "CPU seconds": used,
        "peak of the run (MB)": memory.own / 1e6,
        "with the temporary server (MB)": memory.whole / 1e6,
        "bad rows reported": f"{reported} of {rows // BAD}",
        "kinds found": "all" if pure else "not all",
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Run every size and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--form", nargs="+", default=["jsonl"], choices=["jsonl", "parquet"])
    parser.add_argument("--folder", type=Path, help="for the files, which are removed")
    given = parser.parse_args()
    figures = []
    for form in given.form:
        for rows in given.rows:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                figures.append(prepare(rows, form, Path(folder)))
            print(json.dumps(figures[-1]), flush=True)
    report(
        "million_rows",
        "Rows through read, tokenise, embed, cluster and divide",
        pd.DataFrame(figures),
        f"Embeddings given (D = {WIDTH}), k-means with K = {KINDS} on a sample of 50 000 rows; the "
        "whole command, with imports, the check of the rows before the run and a temporary Prefect "
        "server. Memory is resident memory, seen five times a second.",
    )


if __name__ == "__main__":
    main()
