"""Training on a base of 4-bit weights: what the same weights give unpacked, by both engines."""

import importlib.util

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tclora.config import AdapterConfig, TrainConfig
from tclora.errors import ModelError
from tclora.files import sha256_path
from tclora.model.base import Base
from tclora.model.quantised import NF4_BYTES, load_quantised
from tclora.model.reading import Packed, reading
from tclora.preflight.sizes import base_size
from tclora.preflight.training_cost import Lengths, job_memory
from tclora.train.engines import AdapterRequest, train_adapters
from tests.train.test_together import assert_same_adapters, assert_same_results

MISSING = importlib.util.find_spec("bitsandbytes") is None
needed = pytest.mark.skipif(MISSING, reason="pip install tclora[qlora]")
SIZES = {"animals": 9, "birds": 5}
FAST = {"r": 4, "alpha": 8, "lr": 1e-3, "batch_size": 4, "epochs": 4, "tokens_per_forward": 150}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")


def place(folder, dtype="float32"):
    return Base(location=str(folder), digest="", dtype=dtype, template="plain", max_tokens=64)


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    """Train two adapters; returns their results and folder."""
    for name, count in SIZES.items():
        texts = [f"{name} {'so ' * (i % 5)}{i}" for i in range(count)]
        answers = [f"{i * 7} {name[:2]}" for i in range(count)]
        pd.DataFrame({"prompt": texts, "response": answers}).to_parquet(tmp_path / name)

    def run(folder, engine="together", on=tiny_model_dir, dtype="float32", **changes):
        target = tmp_path / folder
        requests = [
            AdapterRequest(
                name=name, rows=tmp_path / name, target=target / name,
                checkpoint=target / f"{name}.part",
            )
            for name in SIZES
        ]  # fmt: skip
        results = train_adapters(
            engine=engine,
            base=place(on, dtype),
            requests=requests,
            config=AdapterConfig(**FAST | {"quantisation": "nf4"} | changes),
        )
        return results, target

    return run


@pytest.fixture
def unpacked(tiny_model_dir, tokenizer, tmp_path):
    """A folder of the tiny model with plain weights of the values that the 4-bit ones have."""
    from bitsandbytes.functional import dequantize_4bit

    quantised = load_quantised(str(tiny_model_dir), torch.float32)
    plain = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
    plain.save_pretrained(tmp_path / "unpacked")
    tokenizer.save_pretrained(tmp_path / "unpacked")
    return tmp_path / "unpacked"


@needed
@pytest.mark.parametrize("engine", ["separate", "together"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"validation_fraction": 0.3, "validation_steps": 2},
        {"target_modules": ("q_proj", "lm_head")},
    ],
    ids=str,
)
def test_adapters_are_those_of_the_same_weights_unpacked(train, unpacked, engine, changes):
    found, four_bits = train("four", engine, **changes)
    wanted, plain = train("plain", engine, on=unpacked, quantisation=None, **changes)
    assert_same_results(found, wanted)
    assert_same_adapters(plain, four_bits, SIZES)


@needed
def test_4_bit_weights_matter_and_come_out_equal_each_time(train):
    (_, one), (_, two) = train("one"), train("two")
    _, whole = train("whole", quantisation=None)
    digests = [[sha256_path(folder / name) for name in SIZES] for folder in (one, two, whole)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


@needed
def test_low_precision_and_dropout_learn(train):
    results, _ = train("low", dtype="bfloat16", dropout=0.1, epochs=12, lr=5e-3)
    for result in results.values():
        assert result.final_loss < 0.9 * result.history[0]["loss"]


@needed
def test_rows_are_packed_and_layers_keep_their_layout(tiny_model_dir):
    model = load_quantised(str(tiny_model_dir), torch.float32)
    assert isinstance(reading(model, 64), Packed)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer(torch.ones(1, 32))
    x = torch.ones(1, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_without_bitsandbytes_a_line_says_what_to_install(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("tclora.model.quantised.installed", lambda: False)
    with pytest.raises(ModelError, match=r"pip install tclora\[qlora\]$"):
        place(tiny_model_dir).load("nf4")


def test_a_plan_counts_4_bit_weights(tiny_model_dir):
    size = base_size(str(tiny_model_dir), TrainConfig())
    whole, four = (
        job_memory(size, AdapterConfig(quantisation=way), Lengths(50, 10), 1, 2, 1024)
        for way in (None, "nf4")
    )
    assert whole - four == pytest.approx(size.linear * (2 - NF4_BYTES))
