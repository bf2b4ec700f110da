"""Someone's own rows, a whole run on a tiny model, and what it writes."""

import json
import random

import pytest

from flows.pipeline import pipeline
from tclora.library.manifest import verify

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ALWAYS = {"library.json", "report.html"}  # written by every run: they name the run
WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "house", "music", "paper", "light")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def alpaca_rows():
    """Two clearly different tasks without labels."""
    rng = random.Random(0)
    for _ in range(28):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        yield {
            "instruction": f"Add the two numbers {a} and {b}.",
            "input": "",
            "output": str(a + b),
        }
        words = rng.sample(WORDS, 3)
        yield {
            "instruction": "Write this list of words in reverse order.",
            "input": ", ".join(words), "output": ", ".join(reversed(words)),
        }  # fmt: skip


def write_rows(folder, rows):
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("project")
    data = write_rows(folder, alpaca_rows())
    return {
        "name": "mine",
        "output": str(folder / "runs"),
        "publish_to": f"file://{folder}/published",
        "base_model": str(tiny_model_dir),
        "data": {"path": str(data), "test_fraction": 0.2},
        "cluster": {"k": 2, "min_rows": 4},
        "train": {
            "r": 2, "alpha": 4, "lr": 2e-2, "batch_size": 8, "epochs": 2, "template": "plain",
            "target_modules": ["q_proj", "v_proj", "down_proj"], "dtype": "float32",
        },
        "factorise": {"rank": 2, "ranks": [1, 2, 4], "n_starts": 1, "n_iter": 20},
        "evaluate": {"max_new_tokens": 4, "resamples": 100, "cross_rows": 3},
        "merge": {"methods": ["tc-lora", "uniform"], "refit_steps": 2},
        "resources": {"jobs": 2},
    }  # fmt: skip


def stamps_of(library):
    return {
        path.relative_to(library).as_posix(): path.stat().st_mtime_ns
        for path in library.rglob("*")
        if path.is_file()
    }


def written_by(library, settings, **sections):
    """Run the pipeline; return the files it has written, and its outcome."""
    before = stamps_of(library)
    changed = settings | {name: settings[name] | values for name, values in sections.items()}
    outcome = pipeline(changed)
    after = stamps_of(library)
    assert verify(library) == []
    return {name for name in after if after[name] != before.get(name)}, outcome
