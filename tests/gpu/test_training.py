"""Training on a GPU: the adapters a CPU gives, and engines that agree."""

import logging
import math
import shutil

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.errors import NonFiniteLossError
from tclora.model.base import Base
from tclora.model.kernels.attention import has_flash
from tclora.model.tokens import TokenRow
from tclora.train.engines import AdapterRequest, train_adapters
from tclora.train.loop import train_adapter

FLASH = torch.cuda.is_available() and has_flash(torch.device("cuda"), torch.bfloat16)
ROWS = {"animals": 17, "birds": 9, "cars": 5}
FAST = {"r": 4, "alpha": 8, "lr": 1e-3, "batch_size": 4, "epochs": 12, "tokens_per_forward": 150}


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    for name, count in ROWS.items():
        prompts = [f"{name} {'so ' * (i % 5)}{i}" for i in range(count)]
        answers = [f"{i * 7} {name[:2] * (1 + i % 3)}" for i in range(count)]
        pd.DataFrame({"prompt": prompts, "response": answers}).to_parquet(tmp_path / name)

    def run(engine, folder, dtype="float32", location=tiny_model_dir, names=tuple(ROWS), **changes):
        base = Base(
            location=str(location), digest="tiny", dtype=dtype, template="plain", max_tokens=64
        )
        events = changes.pop("events", [])
        requests = [
            AdapterRequest(
                name=name,
                rows=tmp_path / name,
                target=tmp_path / folder / name,
                checkpoint=tmp_path / f"{folder}-{name}",
                seed=3,
            )
            for name in names
        ]
        results = train_adapters(
            engine=engine, base=base, requests=requests, on_event=events.append,
            config=AdapterConfig(**FAST | changes),
        )  # fmt: skip
        return results, {name: read_adapter(tmp_path / folder / name) for name in names}

    return run


def assert_close(one, two, tolerance):
    """Compare updates by their norm."""
    for name, adapter in one.items():
        for module, factors in adapter.modules.items():
            wanted = factors.delta()
            found = two[name].modules[module].delta()
            assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("engine", ["separate", "together"])
@pytest.mark.parametrize("changes", [{}, {"freeze_a": True, "lr_ratio": 2.0}], ids=str)
def test_a_gpu_gives_the_adapters_of_a_cpu(train, monkeypatch, engine, changes):
    found, here = train(engine, "gpu", **changes)
    monkeypatch.setattr("tclora.model.base.default_device", lambda: "cpu")
    wanted, there = train(engine, "cpu", **changes)
    assert_close(there, here, 1e-3)
    for name, result in wanted.items():
        assert found[name].final_loss == pytest.approx(result.final_loss, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_a": True},
        {"gradient_checkpointing": True},
        {"validation_fraction": 0.3, "validation_steps": 2, "patience": 4},
    ],
    ids=str,
)
def test_one_stacked_product_gives_what_separate_training_gives(train, changes):
    _, wanted = train("separate", "separate", **changes)
    _, found = train("together", "together", **changes)
    assert_close(wanted, found, 1e-4)


@pytest.mark.skipif(not FLASH, reason="flash attention reads no rows of unequal length here")
@pytest.mark.parametrize(
    "changes", [{}, {"freeze_a": True}, {"gradient_checkpointing": True}], ids=str
)
def test_in_half_precision_rows_are_packed_and_stay_close(train, changes):
    exact, _ = train("separate", "exact", epochs=30, lr=5e-3, **changes)
    for engine in ("separate", "together"):
        found, _ = train(engine, engine, "bfloat16", epochs=30, lr=5e-3, **changes)
        for name, result in exact.items():
            assert result.final_loss < 0.8 * result.history[0]["loss"]
            assert found[name].final_loss == pytest.approx(result.final_loss, rel=2e-2)
            assert all(record["padding"] == 0 for record in found[name].history)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_team_gives_the_same_adapters(train):
    _, wanted = train("together", "alone")
    _, found = train("together", "team", data_parallel=2)
    assert_close(wanted, found, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_what_is_not_finite_stays_with_its_adapter(
    train, tiny_model, tiny_model_dir, tmp_path, dtype, tolerance
):
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(tiny_model_dir)("~").input_ids
    with torch.no_grad():  # of a token that one adapter's rows alone have
        tiny_model.model.embed_tokens.weight[token] = float("nan")
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    tiny_model.save_pretrained(tmp_path / "model")
    pd.DataFrame({"prompt": ["~"], "response": ["x"]}).to_parquet(tmp_path / "broken")
    place = {"location": tmp_path / "model", "dtype": dtype}
    _, wanted = train("separate", "alone", names=("birds",), **place)
    seen, both = [], {"names": ("birds", "broken"), **place}
    with pytest.raises(NonFiniteLossError, match="loss of adapter 'broken' became nan at step 0"):
        train("together", "out", events=seen, **both)
    assert [event["name"] for event in seen] == ["birds"] * len(seen)
    assert all(math.isfinite(event["grad_norm"]) for event in seen)
    assert_close(wanted, {"birds": read_adapter(tmp_path / "out" / "birds")}, tolerance)


def test_what_exceeds_the_memory_is_tried_in_smaller_parts(tmp_path, caplog):
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1408,
                        num_hidden_layers=8, num_attention_heads=8)  # fmt: skip
    rows = [TokenRow(tuple(range(5, 405)), tuple(range(7, 107))) for _ in range(32)]
    config = AdapterConfig(batch_size=32, max_steps=2, epochs=10, tokens_per_forward=16384)
    losses = {}
    for name, room in (("whole", None), ("small", 0.9e9)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).to("cuda", torch.bfloat16).eval()
        if room:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(
                (torch.cuda.memory_reserved() + room) / total
            )
        try:
            with caplog.at_level(logging.WARNING):
                result = train_adapter(model, rows, config, tmp_path / name, base_model="random")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        losses[name] = [record["loss"] for record in result.history]
    assert "out of memory: train.tokens_per_forward is 8192 from here on" in caplog.text
    assert losses["small"] == pytest.approx(losses["whole"], rel=1e-2)
