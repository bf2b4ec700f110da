"""What `tclora run --plan` says a training takes, beside what it takes.

Models of several widths and depths, rows of several lengths, ranks and numbers of adapters; every
point is planned from rates measured in the same process, before and after its training.
Usage: ``python benchmarks/training_cost.py FILE.jsonl FILE.jsonl ... [--dtype float32|bfloat16]``;
a file holds rows with ``prompt`` and ``response``, and better they differ in length.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from tables import report
from training_ways import by_engine
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.config import AdapterConfig, TrainConfig
from tclora.model.base import Base
from tclora.model.locate import BUILTIN_BASE, load_tokenizer, locate_base_model
from tclora.preflight.rates import Rates, measured_rates
from tclora.preflight.sizes import base_size
from tclora.preflight.training_cost import Lengths, training_seconds

TOLERANCE = 0.25


@dataclass(frozen=True)
class Point:
    """A training.

    Attributes
    ----------
    model : str
        SmolLM2-135M, or "width x layers" of a Llama of random weights.
    engine : str
        Of training.
    adapters, first : int
        Files of rows, one per adapter, from this one on.
    r, rows, steps : int
        Rank, and rows per optimiser step and steps of an adapter.
    """

    model: str
    engine: str = "separate"
    adapters: int = 1
    first: int = 0
    r: int = 16
    rows: int = 8
    steps: int = 4


POINTS = (
    *(Point("SmolLM2-135M", first=number) for number in range(4)),
    Point("SmolLM2-135M", r=4, rows=16, steps=2),
    Point("SmolLM2-135M", r=64),
    Point("SmolLM2-135M", rows=32, steps=2),
    Point("SmolLM2-135M", "together", adapters=2),
    Point("SmolLM2-135M", "together", adapters=7, rows=4, steps=3),
    Point("SmolLM2-135M", "together", adapters=7, r=64, rows=4, steps=2),
    Point("256 x 8", rows=16),
    Point("256 x 24", rows=16),
    Point("1024 x 4"),
    Point("1024 x 12"),
    Point("2048 x 4", rows=4),
)


def measure(point: Point, sources: list[Path], folder: Path, dtype: str) -> dict[str, float]:
    """Train one point in this process; return the measured and the planned seconds."""
    base = Base(location=_model(point.model, folder), digest="", dtype=dtype, template="plain",
                max_tokens=512)  # fmt: skip
    config = AdapterConfig(r=point.r, max_steps=point.steps, batch_size=point.rows, epochs=1000)
    files = []
    for number in range(point.adapters):
        source = sources[(point.first + number) % len(sources)]
        frame = pd.read_json(source, lines=True, nrows=point.rows * point.steps)
        files.append(folder / f"{number}.parquet")
        frame[["prompt", "response"]].astype(str).to_parquet(files[-1])
    loaded = base.load()
    kind = loaded.model.dtype
    rows = [row for file in files for row in loaded.encode(file)]
    del loaded
    tokens = sum(map(len, rows))
    lengths = Lengths(tokens / len(rows), sum(len(row.response) for row in rows) / len(rows))
    before = measured_rates(kind)
    seconds, _ = by_engine(point.engine, base, files, config)
    after = measured_rates(kind)
    rates = Rates((before.products + after.products) / 2, (before.elements + after.elements) / 2)
    size = base_size(base.location, TrainConfig(r=point.r))
    jobs = [[point.steps] * point.adapters]
    if point.engine == "separate":
        jobs = [[point.steps]] * point.adapters
    planned = sum(
        training_seconds(size, config, lengths, tokens / len(jobs), steps, rates) for steps in jobs
    )
    return {
        "tokens per row": lengths.row,
        "tokens": tokens,
        "products (GFLOP/s)": rates.products / 1e9,
        "elements (G/s)": rates.elements / 1e9,
        "measured (s)": seconds,
        "planned (s)": planned,
        "planned / measured": planned / seconds,
    }


def _model(name: str, folder: Path) -> str:
    """Return where the model is; one that is not SmolLM2 is drawn at random with its tokenizer."""
    known = locate_base_model(BUILTIN_BASE)
    if "x" not in name:
        return known
    width, layers = map(int, name.split(" x "))
    place = folder / f"{width}-{layers}"
    tokenizer = load_tokenizer(known)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 256, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def main() -> None:
    """Measure every point in a process of its own and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--point", type=int, help="measure this one here")
    given = parser.parse_args()
    if given.point is not None:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(POINTS[given.point], given.files, Path(scratch), given.dtype)
        print(json.dumps(found))
        return
    figures = []
    for number, point in enumerate(POINTS):
        command = [sys.executable, __file__, *map(str, given.files), "--dtype", given.dtype]
        command += ["--point", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # this script
        shown = {name: value for name, value in asdict(point).items() if name != "first"}
        figures.append(shown | json.loads(done.stdout.splitlines()[-1]))
        print(figures[-1], file=sys.stderr)
    frame = pd.DataFrame(figures)
    off = (frame["planned / measured"] - 1).abs()
    report(
        f"training_cost_{given.dtype}",
        f"Planned and measured times of training ({given.dtype})",
        frame,
        f"Within {TOLERANCE:.0%}: {int((off <= TOLERANCE).sum())} of {len(frame)} points; "
        f"median deviation {off.median():.0%}, largest {off.max():.0%}.",
    )


if __name__ == "__main__":
    main()
