"""Libraries of adapters for eight public tasks, to measure merges and routers on.

Usage: ``python benchmarks/real_library.py DATA OUT [--seeds 0 1 2] [--epochs E]``. DATA holds
``train/TASK.jsonl`` and ``test/TASK.jsonl`` with columns prompt, response, answer and choices. For
every seed other rows are drawn, clustered by the embedding of their prompts, and made a library
OUT/seedN by the pipeline's own steps up to the merge: SmolLM2-135M-Instruct, eight adapters and the
joint one. Nothing is evaluated; the held-out rows that lie in the library are test rows of the
eight tasks and, as split ``ood``, of all others. A command that was stopped goes on where it was.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from tclora_cli.commands.shared import settle_environment
from tclora_cli.server import TemporaryServer

TASKS = (
    "mawps", "nl2bash", "boolq", "arc_easy", "commonsense_qa", "snli", "clinc_domain", "e2e_nlg",
)  # fmt: skip
TRAIN_ROWS, TEST_ROWS, OTHER_ROWS = 300, 60, 100  # per task
_COLUMNS = ["prompt", "response", "task", "answer", "choices"]


def draw(data: Path, seed: int) -> pd.DataFrame:
    """Draw the rows of one library: to train on, held out, and of tasks that none is trained on."""
    others = sorted(file.stem for file in (data / "test").glob("*.jsonl"))
    others = [task for task in others if task not in TASKS]
    return pd.concat(
        [
            *_parts(data / "train", TASKS, TRAIN_ROWS, "train", seed),
            *_parts(data / "test", TASKS, TEST_ROWS, "test", seed),
            *_parts(data / "test", others, OTHER_ROWS, "ood", seed),
        ],
        ignore_index=True,
    )


def _parts(
    folder: Path, tasks: Iterable[str], count: int, split: str, seed: int
) -> Iterable[pd.DataFrame]:
    for task in tasks:
        rows = pd.read_json(folder / f"{task}.jsonl", lines=True, dtype=False)
        rows = rows.assign(task=task)[_COLUMNS].drop_duplicates("prompt")
        yield rows.sample(count, random_state=seed).assign(split=split)


def settings(name: str, rows: Path, seed: int, epochs: float) -> dict[str, Any]:
    """Return the configuration of one library."""
    return {
        "name": name,
        "output": str(rows.parent),
        "seed": seed,
        "data": {"path": str(rows)},
        "cluster": {"k": len(TASKS)},
        "train": {
            "lr": 2e-3, "batch_size": 8, "epochs": epochs, "max_tokens": 512, "template": "plain",
        },
        "factorise": {"ranks": [4, 8, 16, 32]},
        "merge": {"methods": ["tc-lora"]},
        "route": {"calibration_rows": 0},  # benchmarks of routers calibrate their own
    }  # fmt: skip


def make(data: Path, out: Path, seed: int, epochs: float) -> None:
    """Make one library, unless it is there; what a run that was stopped has made is kept."""
    from prefect import flow

    from flows import merge, prepare, publish, train
    from flows.opening import opened
    from tclora.config import load_config
    from tclora.preflight import check

    name = f"seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    rows = out / f"{name}.jsonl"
    draw(data, seed).to_json(rows, orient="records", lines=True)
    config = load_config(settings(name, rows, seed, epochs))

    @flow(name="real-library", validate_parameters=False)
    def steps() -> None:
        with opened(config, check(config)) as context:
            prepared = prepare.prepare(context)
            trained = train.train(context, prepared)
            merged = merge.merge(context, prepared, trained)
            publish.publish(context, prepared, trained, merged, None)

    steps()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=0.5)
    arguments = parser.parse_args()
    settle_environment()
    server = TemporaryServer()  # before anything imports Prefect
    server.start()
    server.wait()
    for seed in arguments.seeds:
        make(arguments.data, arguments.out, seed, arguments.epochs)
