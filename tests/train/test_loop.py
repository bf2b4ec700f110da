import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, get_scheduler

from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.errors import ModelError, NonFiniteLossError
from tclora.files import sha256_path
from tclora.model.loss import response_nll
from tclora.model.tokens import batches
from tclora.train.course import total_steps
from tclora.train.lora import attach_lora, linear_layer_names
from tclora.train.records import Checkpoint
from tests.train.several import StopHereError
from tests.train.single import FAST, rows, train

__all__ = ["rows", "train"]

IDS = torch.tensor([[20, 30, 40, 50, 60]])


def test_the_loss_falls_and_is_recorded(train):
    result, _ = train()
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.6 * losses[0]
    assert result.steps == len(losses) == 9
    assert [record["step"] for record in result.history] == list(range(9))
    assert result.final_loss == pytest.approx(losses[-1])
    assert result.supervised_tokens == sum(r["tokens"] for r in result.history)
    assert {"loss", "lr", "grad_norm", "tokens", "seconds"} < result.history[0].keys()
    assert json.loads(json.dumps(result.history))


def test_the_first_loss_is_the_bases(train, tiny_model, rows):
    result, _ = train(batch_size=6, max_steps=1)
    with torch.no_grad():
        parts = [response_nll(tiny_model, batch).sum() for batch in batches(rows, pad_id=0)]
    tokens = sum(len(row.response) for row in rows)
    assert result.history[0]["loss"] == pytest.approx(sum(parts).item() / tokens, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"freeze_a": True}], ids=str)
def test_the_same_seed_gives_the_same_bytes(train, changes):
    digests = [sha256_path(train(name, **changes)[1]) for name in ("a", "b")]
    assert digests[0] == digests[1]


def test_seeds_change_the_adapter(train):
    variants = ({}, {"seed": 1}, {"init_seed": 1})
    digests = {
        sha256_path(train(f"a{i}", options=options)[1]) for i, options in enumerate(variants)
    }
    assert len(digests) == 3


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"freeze_a": True}], ids=str)
def test_a_resumed_training_ends_with_the_same_bytes(train, tmp_path, changes):
    whole, target = train("whole", **changes)
    checkpoint = tmp_path / "checkpoint"

    def interrupt(record):
        if record["step"] == 4:
            raise StopHereError

    with pytest.raises(StopHereError):
        train("cut", **changes,
              options={"checkpoint": Checkpoint(checkpoint, 2), "on_step": interrupt})  # fmt: skip
    assert len(json.loads((checkpoint / "history.json").read_text())) == 4
    assert not (tmp_path / "cut").exists()
    seen = []
    options = {"checkpoint": Checkpoint(checkpoint, 2), "on_step": seen.append}
    resumed, again = train("cut", **changes, options=options)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (target / name).read_bytes()
    assert len(json.loads((checkpoint / "history.json").read_text())) == resumed.steps
    assert [record["step"] for record in seen] == list(range(9))
    keys = ("step", "loss", "lr", "grad_norm", "tokens")
    assert [[r[k] for k in keys] for r in resumed.history] == [
        [r[k] for k in keys] for r in whole.history
    ]


def test_the_adapter_loads_with_stock_peft_and_lowers_the_loss(train, tiny_model_dir, rows):
    result, target = train(batch_size=len(rows))
    stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_dir), target)
    (batch,) = batches(rows, pad_id=0)
    with torch.no_grad():
        loss = response_nll(stock.eval(), batch).sum().item() / batch.supervised
    assert loss < result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    "changes", [{}, {"rslora": True, "lr_ratio": 4.0}, {"rslora": True, "r": 16}], ids=str
)
def test_training_is_that_of_peft_and_torch(train, tiny_model_dir, rows, changes):
    options = {"lr": 2e-3, "batch_size": len(rows), "epochs": 12, "schedule": "linear"} | changes
    _, target = train(**options)
    config = AdapterConfig(**FAST | options)
    model = attach_lora(LlamaForCausalLM.from_pretrained(tiny_model_dir), config, seed=0)
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [w for name, w in own.items() if f"lora_{part}" in name], "lr": lr}
        for part, lr in (("A", config.lr), ("B", config.lr * config.lr_ratio))
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_scheduler("linear", optimiser, num_warmup_steps=1, num_training_steps=12)
    (batch,) = batches(rows, pad_id=0)
    for _ in range(12):
        optimiser.zero_grad()
        (response_nll(model, batch).sum() / batch.supervised).backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), config.max_grad_norm)
        optimiser.step()
        schedule.step()
    found = read_adapter(target).modules
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            factors = found[name.removeprefix("base_model.model.")]
            assert torch.allclose(factors.A, layer.lora_A["default"].weight, atol=2e-5)
            wanted = layer.lora_B["default"].weight * config.scaling
            assert torch.allclose(factors.B, wanted, atol=2e-5 * config.scaling)
            assert factors.B.abs().max() > 1e-3


def test_low_precision_weights_train_with_exact_masters(train, tiny_model_dir):
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    result, target = train(model=model, lr=1e-3)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    tensors = load_file(target / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors)


def read_a(folder):
    return {name: factors.A for name, factors in read_adapter(folder).modules.items()}


def initial_a(tiny_model_dir, seed):
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    attach_lora(model, AdapterConfig(**FAST), seed)
    return {
        name: layer.lora_A["default"].weight.detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def test_frozen_a_stays_at_its_start(train, tiny_model_dir):
    _, target = train(freeze_a=True)
    start = initial_a(tiny_model_dir, seed=0)
    for name, A in read_a(target).items():
        assert torch.equal(A, start[name])
    assert all(f.B.abs().max() > 0 for f in read_adapter(target).modules.values())


def test_trained_a_leaves_its_start(train, tiny_model_dir):
    _, target = train()
    start = initial_a(tiny_model_dir, seed=0)
    assert not any(torch.equal(A, start[name]) for name, A in read_a(target).items())


def test_adapters_share_their_start_whatever_their_rows(train, rows, tiny_model_dir):
    _, one = train("one", on=rows[:3], freeze_a=True, options={"seed": 1})
    _, two = train("two", on=rows[3:], freeze_a=True, options={"seed": 2})
    _, other = train("other", on=rows[3:], freeze_a=True, options={"init_seed": 1})
    a, b, c = read_a(one), read_a(two), read_a(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_the_start_does_not_touch_the_global_generator(tiny_model_dir):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    initial_a(tiny_model_dir, seed=9)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("targets", ["nothing", ("query", "value")])
def test_targets_that_match_nothing_are_refused_with_the_layers_there_are(train, targets):
    with pytest.raises(ModelError, match=r"matches no linear layer.*'q_proj'"):
        train(target_modules=targets)


def test_named_targets_alone_are_trained(train):
    _, target = train(target_modules=("q_proj", "down_proj"), max_steps=1)
    names = {name.rpartition(".")[2] for name in read_adapter(target).modules}
    assert names == {"q_proj", "down_proj"}


def test_linear_layer_names(tiny_model):
    assert linear_layer_names(tiny_model) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(train, tiny_model, tmp_path, bad):
    with torch.no_grad():
        tiny_model.lm_head.weight[5] = bad
    with pytest.raises(NonFiniteLossError, match=r"at step 0; lower train.lr \(now 0.05\)"):
        train("bad", model=tiny_model)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("tokens_per_forward", [1, 40])
def test_a_step_split_to_the_token_budget_equals_the_whole_batch(train, tokens_per_forward):
    whole, a = train("whole", batch_size=6, max_steps=3)
    split, b = train("split", batch_size=6, max_steps=3, tokens_per_forward=tokens_per_forward)
    for wanted, found in zip(whole.history, split.history, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    one, two = read_adapter(a).modules, read_adapter(b).modules
    for name in one:
        assert torch.allclose(one[name].delta(), two[name].delta(), atol=2e-4)


def test_gradient_checkpointing_changes_nothing(train):
    plain, _ = train("plain", max_steps=3)
    saving, _ = train("saving", max_steps=3, gradient_checkpointing=True)
    wanted = [record["loss"] for record in plain.history]
    assert [record["loss"] for record in saving.history] == pytest.approx(wanted, rel=1e-5)


def test_fewer_rows_than_a_batch_fill_one_step(train, rows):
    result, _ = train(on=rows[:2], batch_size=16, epochs=1)
    assert result.steps == 1
    assert result.history[0]["tokens"] >= sum(len(row.response) for row in rows[:2])


def test_all_rows_in_one_step(train, rows):
    result, _ = train(batch_size=len(rows), epochs=1)
    assert result.steps == 1
    assert result.history[0]["tokens"] == sum(len(row.response) for row in rows)


def test_every_row_is_seen_once_per_epoch(train, rows):
    result, _ = train(batch_size=2, epochs=2)
    tokens = sum(len(row.response) for row in rows)
    assert result.steps == 6
    assert sum(r["tokens"] for r in result.history[:3]) == tokens
    assert sum(r["tokens"] for r in result.history[3:]) == tokens


@pytest.mark.parametrize(
    ("n", "changes", "wanted"),
    [
        (10, {"batch_size": 4, "epochs": 1}, 3),
        (10, {"batch_size": 4, "epochs": 0.1}, 1),
        (10, {"batch_size": 4, "epochs": 2}, 5),
        (1, {"batch_size": 16, "epochs": 1}, 1),
        (100, {"batch_size": 1, "epochs": 1, "max_steps": 7}, 7),
        (3, {"batch_size": 1, "epochs": 1, "max_steps": 7}, 3),
    ],
)
def test_total_steps(n, changes, wanted):
    assert total_steps(n, AdapterConfig(**changes)) == wanted


def test_warm_up_and_decay(train):
    result, _ = train(batch_size=1, epochs=2, warmup_fraction=0.25, schedule="linear")
    rates = [record["lr"] for record in result.history]
    assert rates[0] == 0
    assert max(rates) == rates[3] == pytest.approx(5e-2)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_b_learns_at_its_own_rate(train):
    """The first step of Adam is the learning rate in size; A has no gradient while B is zero."""
    plain, fast = (
        read_adapter(train(str(ratio), max_steps=1, lr=1e-3, lr_ratio=ratio)[1]).modules
        for ratio in (1.0, 8.0)
    )
    for module, factors in plain.items():
        assert torch.allclose(fast[module].B, 8 * factors.B, rtol=1e-3, atol=1e-7)
        assert torch.equal(fast[module].A, factors.A)
