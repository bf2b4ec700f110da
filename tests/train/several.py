"""Adapters of three clusters, trained by an engine, and how alike two trainings are."""

import re

import pandas as pd
import pytest
from torch import nn

from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.files import sha256_path
from tclora.model.base import Base
from tclora.train.engines import AdapterRequest, train_adapters

FAST = {"r": 4, "alpha": 8, "lr": 1e-3, "batch_size": 4, "epochs": 12, "tokens_per_forward": 150}
ROWS = {"animals": 17, "birds": 9, "cars": 5}  # 51, 27 and 15 steps
KEYS = ("step", "loss", "lr", "grad_norm", "tokens")


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return Base(
        location=str(tiny_model_dir),
        digest="tiny",
        dtype="float32",
        template="plain",
        max_tokens=64,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Parquet files of rows that name their adapter and differ in length."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in ROWS.items():
        prompts = [f"{name} {'so ' * (i % 5)}{i}" for i in range(count)]
        answers = [f"{i * 7} {name[:2] * (1 + i % 3)}" for i in range(count)]
        pd.DataFrame({"prompt": prompts, "response": answers}).to_parquet(folder / name)
    return folder


@pytest.fixture
def train(base, rows, tmp_path):
    """Train the adapters by an engine; returns the results, events and the adapters' folder."""

    def run(engine="together", folder="out", names=tuple(ROWS), on_event=None, every=5, **changes):
        events = []
        target = tmp_path / folder
        inits, model = changes.pop("inits", {}), changes.pop("on", base)
        suffix = changes.pop("suffix", "")
        requests = [
            AdapterRequest(
                name=name,
                rows=rows / f"{name}{suffix}",
                target=target / name,
                checkpoint=target / "checkpoints" / name,
                seed=3,
                init_seed=inits.get(name, 0),
            )
            for name in names
        ]
        results = train_adapters(
            engine=engine,
            base=model,
            requests=requests,
            config=AdapterConfig(**FAST | changes),
            checkpoint_steps=every,
            on_event=on_event or events.append,
        )
        return results, events, target

    return run


def assert_same_adapters(one, two, names=tuple(ROWS), tolerance=1e-5):
    for name in names:
        a, b = (read_adapter(folder / name).modules for folder in (one, two))
        assert a.keys() == b.keys()
        for module in a:
            for x, y in zip(a[module], b[module], strict=True):
                assert (x - y).abs().max() <= tolerance


def assert_same_results(one, two):
    assert list(one) == list(two)
    for name in one:
        assert one[name].steps == two[name].steps
        for a, b in zip(one[name].history, two[name].history, strict=True):
            assert [a[key] for key in KEYS] == pytest.approx([b[key] for key in KEYS], rel=1e-4)


def histories(results):
    return {name: [[r[key] for key in KEYS] for r in results[name].history] for name in results}


def digests(folder, names=tuple(ROWS)):
    return {name: sha256_path(folder / name) for name in names}


def observe_batches(tokenizer, seen):
    """Record the adapters whose rows enter an embedding, by the rows' own words."""

    def hook(module, inputs):
        if isinstance(module, nn.Embedding):
            texts = tokenizer.batch_decode(inputs[0])
            seen.append([name for text in texts for name in re.findall("|".join(ROWS), text)])

    return nn.modules.module.register_module_forward_pre_hook(hook)


class StopHereError(Exception):
    pass
