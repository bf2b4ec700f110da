"""Trainings killed at random moments: what is resumed must end with the undisturbed bytes.

Three adapters of unequal size are trained by the engine `together` with a checkpoint every other
step: once undisturbed, then again and again with a SIGKILL at a random moment and a second process
that goes on from what the first has left. The model is a Llama of random weights, small enough that
nothing but the moment matters.
Usage: ``python benchmarks/kills.py [KILLS]``.
"""

import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.config import AdapterConfig
from tclora.files import sha256_path
from tclora.model.base import Base
from tclora.model.locate import BUILTIN_BASE, load_tokenizer, locate_base_model
from tclora.train.engines import AdapterRequest, train_adapters

ROWS = {"animals": 17, "birds": 9, "cars": 5}
CONFIG = AdapterConfig(
    r=4, alpha=8, batch_size=4, epochs=12, tokens_per_forward=150,
    validation_fraction=0.2, validation_steps=3, dropout=0.1,
)  # fmt: skip


def drill(base: Base, folder: Path, kills: int, seed: int = 0) -> Iterator[dict[str, float | bool]]:
    """Kill trainings and resume them.

    Parameters
    ----------
    base : Base
        A small model.
    folder : Path
        An empty directory.
    kills : int
        Trainings, each killed once.
    seed : int
        Of the moments.

    Yields
    ------
    dict
        When it was killed (share of the undisturbed training's time), how many steps its
        checkpoints held in all, and whether every adapter has the undisturbed digest.
    """
    _write_rows(folder / "given")
    _finish(_started(base, folder, "warm"))  # starts the server of processes and imports
    begin = time.monotonic()
    _finish(_started(base, folder, "undisturbed"))
    whole = time.monotonic() - begin
    wanted = _digests(folder / "undisturbed")
    moments = random.Random(seed)
    for number in range(kills):
        share, name = moments.random(), f"killed-{number}"
        process = _started(base, folder, name)
        process.join(share * whole)
        process.kill()
        process.join()
        kept = sum(_steps(folder / name / "kept" / adapter) for adapter in ROWS)
        _finish(_started(base, folder, name))
        same = _digests(folder / name) == wanted
        yield {"moment": share, "steps kept": kept, "same bytes": same}


def _started(base: Base, folder: Path, name: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")  # imports once, and forks before threads
    context.set_forkserver_preload(["tclora.train.engines"])
    process = context.Process(target=_train, args=(base, folder, name))
    process.start()
    return process


def _finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a training ended with exit code {process.exitcode}")


def _train(base: Base, folder: Path, name: str) -> None:
    requests = [
        AdapterRequest(
            name=adapter,
            rows=folder / "given" / adapter,
            target=folder / name / adapter,
            checkpoint=folder / name / "kept" / adapter,
        )
        for adapter in ROWS
    ]
    train_adapters(
        engine="together", base=base, requests=requests, config=CONFIG, checkpoint_steps=2
    )


def _write_rows(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, count in ROWS.items():
        prompts = [f"{name} {'so ' * (i % 5)}{i}" for i in range(count)]
        answers = [f"{i * 7} {name[:2] * (1 + i % 3)}" for i in range(count)]
        pd.DataFrame({"prompt": prompts, "response": answers}).to_parquet(folder / name)


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_path(folder / name) for name in ROWS}


def _steps(checkpoint: Path) -> int:
    history = checkpoint / "history.json"
    return len(pd.read_json(history)) if history.is_file() else 0


def small_base(folder: Path) -> Base:
    """Write a Llama of random weights with SmolLM2's tokenizer."""
    tokenizer = load_tokenizer(locate_base_model(BUILTIN_BASE))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Base(location=str(folder), digest="", dtype="float32", template="plain", max_tokens=64)


def main() -> None:
    """Kill, resume and report."""
    from tables import report  # a script's neighbour

    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        frame = pd.DataFrame(drill(small_base(place / "model"), place / "drill", kills))
    good = int(frame["same bytes"].sum())
    report(
        "kills",
        "Trainings killed at random moments and resumed",
        frame,
        f"{good} of {kills} end with the bytes of the undisturbed training.",
    )


if __name__ == "__main__":
    main()
