"""The training engines and TRL's `SFTTrainer` with packing, side by side on a GPU.

Random models of the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 2 7B in bf16, one adapter of
rank 16 on all linear layers per file of rows. `one adapter` trains a single adapter on the rows
that `together` spreads over all. Rates leave out the first steps, which prepare. TRL packs
rows to 1024 tokens, as many sequences per step as hold the tokens of one adapter's step, with
FlashAttention 2 where that is installed and torch's attention elsewhere, and with Liger's kernels
too where those are; it runs in a process of its own, since Liger changes transformers' classes. The
steps shown of ways that train one adapter after the other are sums of one step of each.
Usage: ``python benchmarks/training_gpu.py FILE FILE ... [--models 135M 1B 7B] [--steps N]
[--rows N] [--alone N]``; a file holds rows with ``prompt`` and ``response`` (.jsonl), or tokens
(see `tclora.model.token_file`).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import pandas as pd
import torch
from drawn_models import SHAPES, Clock, Rows, clean, draw_model
from tables import report
from training_ways import operations
from transformers import PreTrainedModel
from trl_rival import trl

from tclora.config import AdapterConfig
from tclora.model.token_file import SUFFIX, TokenFile
from tclora.model.tokens import TokenRow
from tclora.preflight.rates import measured_rates
from tclora.train.job import train_side_by_side
from tclora.train.records import Destination, Trainee


def ours(
    model: PreTrainedModel, rows: Rows, config: AdapterConfig, folder: Path
) -> tuple[float, float]:
    """Train the adapters at once; return seconds of a step and its mean tokens."""
    clock = Clock()
    trainees = {
        f"adapter-{k}": Trainee(own, 0, 0, Destination(folder / f"adapter-{k}", "random", None,
                                                       clock.see))
        for k, own in enumerate(rows)
    }  # fmt: skip
    train_side_by_side(model, trainees, config)
    tokens = sum(len(row) for own in rows for row in own)
    return clock.per_step, tokens / (config.max_steps or 1)


def together(name: str, rows: Rows, config: AdapterConfig, folder: Path) -> tuple[float, float]:
    """Train all adapters at once."""
    return ours(draw_model(name), rows, config, folder)


def separate(name: str, rows: Rows, config: AdapterConfig, folder: Path) -> tuple[float, float]:
    """Train one adapter after the other."""
    found = []
    for own in rows:
        clean()
        found.append(ours(draw_model(name), [own], config, folder))
    seconds, tokens = zip(*found, strict=True)
    return sum(seconds), sum(tokens)


def one_adapter(name: str, rows: Rows, config: AdapterConfig, folder: Path) -> tuple[float, float]:
    """Train a single adapter on all rows, as many at once as `together` has."""
    larger = config.model_copy(update={"batch_size": config.batch_size * len(rows)})
    return ours(draw_model(name), [list(chain.from_iterable(rows))], larger, folder)


def read(file: Path, count: int, vocabulary: int) -> list[TokenRow]:
    """Return rows whose tokens all models know."""
    if file.suffix == SUFFIX:
        found: Sequence[TokenRow] = TokenFile(file)
    else:
        from tclora.model.locate import BUILTIN_BASE, load_tokenizer, locate_base_model
        from tclora.model.tokens import encode_frame

        frame = pd.read_json(file, lines=True, nrows=count)[["prompt", "response"]].astype(str)
        tokenizer = load_tokenizer(locate_base_model(BUILTIN_BASE))
        found = encode_frame(tokenizer, frame, template="chat", max_tokens=512)
    if len(found) < count:
        raise ValueError(
            f"{file} must hold {count} rows, has {len(found)}; lower --steps or --rows"
        )
    return [
        TokenRow(*(tuple(id_ % vocabulary for id_ in part) for part in (row.prompt, row.response)))
        for row in list(found)[:count]
    ]


OURS: dict[str, Callable[..., tuple[float, float]]] = {
    "together": together, "one adapter": one_adapter, "separate": separate,
}  # fmt: skip
RIVALS: dict[str, Callable[..., tuple[float, float]]] = {
    "TRL, packing": partial(trl, liger=False), "TRL, packing, Liger": partial(trl, liger=True),
}  # fmt: skip


def installed(way: str) -> bool:
    """Return whether a rival is."""
    needed = ["trl", *(["liger_kernel"] if "Liger" in way else [])]
    return all(importlib.util.find_spec(name) for name in needed)


def measure(
    train: Callable[..., tuple[float, float]], name: str, given: argparse.Namespace
) -> dict[str, float]:
    """Train in one way; return its figures."""
    config = AdapterConfig(max_steps=given.steps, batch_size=given.rows, epochs=1000,
                           tokens_per_forward=given.tokens)  # fmt: skip
    vocabulary = SHAPES[name]["vocab_size"]
    rows = [read(file, given.steps * given.rows, vocabulary) for file in given.files]
    if train not in (together, one_adapter):
        rows = rows[: given.alone]
    all_rows = [row for own in rows for row in own]
    needed = operations(draw_model(name), config, all_rows) / sum(map(len, all_rows))
    clean()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        seconds, tokens = train(name, rows, config, Path(folder))
    memory = torch.cuda.max_memory_allocated()
    clean()
    return {
        "tokens/s": tokens / seconds,
        "ms per step": 1e3 * seconds,
        "tokens per step": tokens,
        "TFLOP/s": needed * tokens / seconds / 1e12,
        "memory (GB)": memory / 1e9,
    }


def rival(way: str, name: str, given: argparse.Namespace) -> dict[str, float]:
    """Measure a rival in a process of its own."""
    command = [sys.executable, __file__, *map(str, given.files), "--models", name, "--rival", way]
    for option in ("steps", "rows", "tokens"):
        command += [f"--{option}", str(getattr(given, option))]
    command += ["--alone", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # this script
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Train in every way and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="rows per step and adapter")
    parser.add_argument("--tokens", type=int, default=32768, help="per forward pass")
    parser.add_argument(
        "--alone", type=int, default=10, help="adapters trained one after the other"
    )
    parser.add_argument("--rival", choices=tuple(RIVALS), help="measure this one here, once")
    given = parser.parse_args()
    if given.rival:
        print(json.dumps(measure(RIVALS[given.rival], given.models[0], given)))
        return
    peak = measured_rates(torch.bfloat16).products
    figures = []
    for name in given.models:
        ways = {way: partial(measure, train, name, given) for way, train in OURS.items()}
        ways |= {way: partial(rival, way, name, given) for way in RIVALS if installed(way)}
        for way, train in ways.items():
            measured = train()
            share = 100 * measured["TFLOP/s"] * 1e12 / peak
            figures.append({"model": name, "way": way, **measured, "product rate (%)": share})
            print(figures[-1], file=sys.stderr, flush=True)  # a lent machine may go at any time
    report(
        "training_gpu",
        "Training engines side by side on a GPU (bf16)",
        pd.DataFrame(figures),
        f"K = {len(given.files)} adapters of rank 16, {given.steps} steps of {given.rows} rows "
        f"each, at most {given.tokens} tokens per forward pass; `separate` trained {given.alone} "
        f"of them, TRL one. {torch.cuda.get_device_name()}, "
        f"products of 8192 x 8192 matrices at {peak / 1e12:.0f} TFLOP/s. Operations: what training "
        "adapters needs (see `training_ways.operations`), attention's left out.",
    )


if __name__ == "__main__":
    main()
