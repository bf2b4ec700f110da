"""The engine `together` against `separate`: the same adapters, whatever shares their batches."""

import gc
import shutil
import weakref

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tclora.config import AdapterConfig
from tclora.errors import ModelError
from tclora.model.token_file import SUFFIX, write_tokens
from tclora.train.course import Course
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.seats import Member
from tests.train.several import (
    FAST,
    KEYS,
    ROWS,
    assert_same_adapters,
    assert_same_results,
    base,
    digests,
    observe_batches,
    rows,
    train,
)

__all__ = ["base", "rows", "train"]


@pytest.mark.timeout(600)  # processes that import torch
def test_a_team_gives_the_same_adapters(train):
    changes = {"validation_fraction": 0.3, "validation_steps": 2, "patience": 2}
    changes["adapters_at_once"] = 2
    alone, events, one = train(folder="alone", **changes)
    team, told, two = train(folder="team", data_parallel=2, **changes)
    assert_same_adapters(one, two)
    assert_same_results(alone, team)
    assert [(e["name"], e["step"]) for e in told] == [(e["name"], e["step"]) for e in events]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_a": True},
        {"freeze_a": True, "inits": {"birds": 5}},
        {"inits": {"animals": 1, "cars": 2}},
        {"gradient_checkpointing": True, "epochs": 3},
        {
            "validation_fraction": 0.3,
            "validation_steps": 2,
            "patience": 2,
            "rslora": True,
            "lr_ratio": 2.0,
        },
        {"target_modules": ("q_proj", "lm_head"), "epochs": 3},
        {"adapters_at_once": 1},
        {"adapters_at_once": 2, "validation_fraction": 0.3, "validation_steps": 2, "patience": 2},
        {"adapters_at_once": 2, "freeze_a": True},
        {"adapters_at_once": 2, "freeze_a": True, "inits": {"cars": 5}},
        {"adapters_at_once": 2, "inits": {"animals": 1, "cars": 2}},
    ],
    ids=str,
)
def test_every_adapter_is_the_one_separate_training_gives(train, changes):
    wanted, _, alone = train("separate", "separate", **changes)
    found, _, beside = train("together", "together", **changes)
    assert_same_adapters(alone, beside)
    assert_same_results(found, wanted)
    if not changes:
        assert {name: result.steps for name, result in found.items()} == {
            "animals": 51, "birds": 27, "cars": 15,
        }  # fmt: skip


def test_one_adapter_alone(train):
    _, _, alone = train("separate", "separate", names=("birds",))
    results, events, beside = train("together", "together", names=("birds",))
    assert_same_adapters(alone, beside, ("birds",))
    assert list(results) == ["birds"]
    assert [event["step"] for event in events] == list(range(27))


def test_low_precision_stays_close(train, base):
    low = base.model_copy(update={"dtype": "bfloat16"})
    wanted, _, _ = train("separate", "separate", epochs=3, on=low)
    found, _, _ = train("together", "together", epochs=3, on=low)
    for name in ROWS:
        assert found[name].final_loss == pytest.approx(wanted[name].final_loss, rel=1e-2)


def test_events_are_the_records_with_the_adapters_name(train):
    results, events, _ = train()
    for name, result in results.items():
        own = [event for event in events if event["name"] == name]
        assert own == [{"name": name, **record} for record in result.history]
        assert own[0].keys() == {"name", *KEYS, "tokens_per_s", "padding", "seconds", "memory"}


@pytest.mark.parametrize("engine", ["separate", "together"])
def test_whose_rows_share_a_micro_batch(train, tokenizer, engine):
    seen = []
    handle = observe_batches(tokenizer, seen)
    train(engine)
    handle.remove()
    total = sum(len(owners) for owners in seen)
    assert total == 4 * (51 + 27 + 15)
    mixed = [owners for owners in seen if len(set(owners)) > 1]
    if engine == "separate":
        assert mixed == []
    else:
        assert mixed
        assert {tuple(dict.fromkeys(owners)) for owners in seen[-20:]} == {("animals",)}
        assert all(owners == sorted(owners) for owners in seen)


def test_whoever_finishes_leaves_its_place_to_the_next(train, tokenizer):
    seen = []
    handle = observe_batches(tokenizer, seen)
    train(adapters_at_once=2)
    handle.remove()
    shared = [tuple(dict.fromkeys(owners)) for owners in seen]
    mixed = [owners for owners in shared if len(owners) > 1]
    assert list(dict.fromkeys(mixed)) == [("animals", "birds"), ("animals", "cars")]
    assert sum(len(owners) for owners in seen) == 4 * (51 + 27 + 15)


def test_nothing_of_a_finished_adapter_stays(train, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Seen(Course):
        def __init__(self, *args, **arguments):
            gc.collect()
            most.append(len(alive))
            super().__init__(*args, **arguments)
            alive.add(self)

    monkeypatch.setattr("tclora.train.seats.Course", Seen)
    train(adapters_at_once=1, max_steps=2)
    assert most == [0, 0, 0]


def test_rows_are_read_when_they_are_used(train, monkeypatch):
    seen, read = [], Member.row
    monkeypatch.setattr(Member, "row", lambda self, index: seen.append(index) or read(self, index))
    train(max_steps=2)
    assert len(seen) == 2 * 4 * len(ROWS)
    train(max_steps=2)
    assert len(seen) == 2 * 4 * len(ROWS)


def test_micro_batches_respect_the_token_budget(train, tokenizer):
    sizes = []

    def hook(module, inputs):
        if isinstance(module, nn.Embedding):
            sizes.append(inputs[0].numel())

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    train(max_steps=3)
    handle.remove()
    assert max(sizes) <= FAST["tokens_per_forward"]


@pytest.mark.parametrize("engine", ["separate", "together"])
def test_rows_in_tokens_give_the_bytes_that_their_texts_give(train, base, rows, engine):
    watched = {"validation_fraction": 0.3, "epochs": 3}
    _, _, texts = train(engine, "texts", **watched)
    loaded = base.load()
    for name in ROWS:
        write_tokens([loaded.encode(rows / name)], rows / f"{name}{SUFFIX}")
    _, _, tokens = train(engine, "tokens", suffix=SUFFIX, **watched)
    assert digests(tokens) == digests(texts)


def test_the_order_of_the_adapters_does_not_matter(train, rows, tmp_path):
    _, _, one = train(folder="one")
    _, _, two = train(folder="two", names=tuple(reversed(ROWS)))
    assert digests(one) == digests(two)


def test_their_order_in_the_batches_does_not_matter(train, rows):
    """The same rows under names that sort the other way round."""
    new = {"animals": "z", "birds": "y", "cars": "x"}
    for name, other in new.items():
        shutil.copy(rows / name, rows / other)
    _, _, one = train(folder="one")
    _, _, two = train(folder="two", names=tuple(new.values()))
    for name, other in new.items():
        (two / other).rename(two / name)
    assert_same_adapters(one, two, tolerance=1e-6)


def test_a_module_that_does_not_see_rows_is_refused(tiny_model):
    config = AdapterConfig(**FAST)
    weights = fresh_weights(tiny_model, config, 0)
    mixed = MixedLora(tiny_model, [weights, weights], scaling=2.0)
    with (
        mixed.rows([0, 1]),
        pytest.raises(ModelError, match=r"input of .*q_proj must hold every token of 2 rows"),
    ):
        tiny_model(torch.ones(3, 4, dtype=torch.int64))


def test_outside_of_a_batch_the_model_is_the_base(tiny_model):
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted = tiny_model(ids).logits
        weights = fresh_weights(tiny_model, AdapterConfig(**FAST), 0)
        for weight in weights.values():
            weight += 0.3
        mixed = MixedLora(tiny_model, [weights], scaling=2.0)
        assert torch.equal(tiny_model(ids).logits, wanted)
        with mixed.rows([0]):
            assert not torch.allclose(tiny_model(ids).logits, wanted, atol=1e-2)
        assert torch.equal(tiny_model(ids).logits, wanted)


def test_the_target_modules_must_match_something(train):
    with pytest.raises(ModelError, match="matches no linear layer"):
        train(target_modules=("query",))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT, of GPT-2
def test_an_output_that_is_a_view_is_not_added_to_in_place(tokenizer):
    """Layers of GPT-2 return views; its updates are PEFT's."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()
    weights = fresh_weights(model, AdapterConfig(**FAST | {"target_modules": ("c_attn",)}), 0)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.3
    mixed = MixedLora(model, [weights], scaling=2.0)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 16, requires_grad=True)
    A, B = weights.values()
    with mixed.rows([0, 0]):
        found = layer(x)
    wanted = layer(x) + 2.0 * x @ A.mT @ B.mT
    assert torch.allclose(found, wanted, atol=1e-5)
    gradients = []
    for y in (found, wanted):
        for tensor in (x, A, B):
            tensor.grad = None if tensor is x else tensor.grad.zero_()
        y.square().sum().backward(retain_graph=True)
        gradients.append([tensor.grad.clone() for tensor in (x, A, B)])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-3)
