"""The engine `together` against `separate`: the same adapters, whatever shares their batches."""

import gc
import math
import re
import shutil
import weakref
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.errors import ModelError, NonFiniteLossError
from tclora.files import sha256_path
from tclora.jobs.run import LocalExecutor
from tclora.model.base import Base
from tclora.model.token_file import SUFFIX, write_tokens
from tclora.train.course import Course
from tclora.train.engines import AdapterRequest, engines, train_adapters
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.seats import Member

FAST = {"r": 4, "alpha": 8, "lr": 1e-3, "batch_size": 4, "epochs": 12, "tokens_per_forward": 150}
ROWS = {"animals": 17, "birds": 9, "cars": 5}  # 51, 27 and 15 steps
ROWS_OF = MixedLora.rows
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


@pytest.mark.timeout(600)  # processes that import torch
def test_a_team_gives_the_same_adapters(train):
    changes = {"validation_fraction": 0.3, "validation_steps": 2, "patience": 2}
    changes["adapters_at_once"] = 2
    alone, events, one = train(folder="alone", **changes)
    team, told, two = train(folder="team", data_parallel=2, **changes)
    assert_same_adapters(one, two)
    assert_same_results(alone, team)
    assert [(e["name"], e["step"]) for e in told] == [(e["name"], e["step"]) for e in events]


@pytest.mark.timeout(600)
def test_in_a_team_what_is_not_finite_ends_its_adapter_alone(
    train, base, rows, tiny_model, tiny_model_dir, tmp_path
):
    """One row a step, so that one process has nothing to do; a token that is not a number."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[base.load().tokenizer("~").input_ids] = math.nan
    tiny_model.save_pretrained(tmp_path / "model")
    pd.DataFrame({"prompt": ["~"], "response": ["x"]}).to_parquet(rows / "broken")
    changes = {"batch_size": 1, "epochs": 1, "on": base.model_copy(
        update={"location": str(tmp_path / "model")})}  # fmt: skip
    _, _, one = train(folder="alone", names=("cars",), **changes)
    seen, two = [], tmp_path / "team"
    with pytest.raises(NonFiniteLossError, match="loss of adapter 'broken' became nan at step 0"):
        train(folder="team", names=("broken", "cars"), data_parallel=2, on_event=seen.append,
              **changes)  # fmt: skip
    assert [event["name"] for event in seen] == ["cars"] * 5
    assert_same_adapters(one, two, ("cars",))


@pytest.mark.timeout(600)
def test_a_team_goes_on_where_it_was_ended(train):
    def end(event):
        if event["step"] == 12:
            raise KeyboardInterrupt

    given = {"names": ("animals", "cars"), "data_parallel": 2, "dropout": 0.3}
    whole, _, one = train(folder="whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(on_event=end, **given)
    again, told, two = train(**given)
    assert digests(one, ("animals", "cars")) == digests(two, ("animals", "cars"))
    assert histories(again) == histories(whole)
    assert len(told) == sum(result.steps for result in whole.values())


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


def observe_batches(tokenizer, seen):
    """Record the adapters whose rows enter an embedding, by the rows' own words."""

    def hook(module, inputs):
        if isinstance(module, nn.Embedding):
            texts = tokenizer.batch_decode(inputs[0])
            seen.append([name for text in texts for name in re.findall("|".join(ROWS), text)])

    return nn.modules.module.register_module_forward_pre_hook(hook)


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


class StopHereError(Exception):
    pass


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({}, ("animals", 12)),
        ({}, ("birds", 4)),
        ({}, ("cars", 14)),
        ({}, ("animals", 33)),
        ({"freeze_a": True}, ("birds", 9)),
        ({"dropout": 0.3}, ("birds", 11)),
        ({"adapters_at_once": 2}, ("cars", 7)),
        ({"adapters_at_once": 2}, ("animals", 50)),
        ({"adapters_at_once": 1, "dropout": 0.3}, ("birds", 11)),
        (
            {
                "adapters_at_once": 2,
                "validation_fraction": 0.3,
                "validation_steps": 2,
                "patience": 2,
            },
            ("cars", 3),
        ),
    ],
    ids=str,
)
def test_an_interrupted_training_ends_with_the_same_bytes(train, changes, stop):
    whole, _, undisturbed = train(folder="whole", **changes)

    def interrupt(event):
        if (event["name"], event["step"]) == stop:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(folder="cut", on_event=interrupt, **changes)
    resumed, events, again = train(folder="cut", **changes)
    assert digests(again) == digests(undisturbed)
    assert histories(resumed) == histories(whole)
    for name, result in resumed.items():
        assert [e["step"] for e in events if e["name"] == name] == list(range(result.steps))


@pytest.mark.parametrize("lost", [("birds",), ("animals", "cars")], ids=str)
def test_adapters_resume_at_unequal_steps(train, lost):
    whole, _, undisturbed = train(folder="whole")

    def interrupt(event):
        if (event["name"], event["step"]) == ("animals", 22):
            raise StopHereError

    with pytest.raises(StopHereError):
        train(folder="cut", on_event=interrupt)
    for name in lost:
        shutil.rmtree(undisturbed.parent / "cut" / "checkpoints" / name)
    resumed, _, again = train(folder="cut")
    assert digests(again) == digests(undisturbed)
    assert histories(resumed) == histories(whole)


def test_a_finished_training_is_written_again_from_its_checkpoints(train, tokenizer):
    whole, _, folder = train()
    wanted = digests(folder)
    for name in ROWS:
        shutil.rmtree(folder / name)
    seen = []
    handle = observe_batches(tokenizer, seen)
    again, _, _ = train()
    handle.remove()
    assert not any(seen)
    assert digests(folder) == wanted
    assert histories(again) == histories(whole)


@pytest.mark.parametrize("engine", ["separate", "together"])
def test_rows_in_tokens_give_the_bytes_that_their_texts_give(train, base, rows, engine):
    watched = {"validation_fraction": 0.3, "epochs": 3}
    _, _, texts = train(engine, "texts", **watched)
    loaded = base.load()
    for name in ROWS:
        write_tokens([loaded.encode(rows / name)], rows / f"{name}{SUFFIX}")
    _, _, tokens = train(engine, "tokens", suffix=SUFFIX, **watched)
    assert digests(tokens) == digests(texts)


def test_a_checkpoint_is_the_same_engines_alike(train):
    _, _, undisturbed = train("separate", "whole")

    def interrupt(event):
        if (event["name"], event["step"]) == ("birds", 12):
            raise StopHereError

    with pytest.raises(StopHereError):
        train("together", "cut", on_event=interrupt)
    _, _, again = train("separate", "cut")
    assert_same_adapters(undisturbed, again)


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


@pytest.fixture
def breaking(base, rows, tiny_model, tmp_path):
    """A base whose losses are NaN on the rows of the adapter "broken" alone."""
    token = base.load().tokenizer("~").input_ids
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[token] = float("nan")
    model = tmp_path / "model"
    shutil.copytree(base.location, model)
    tiny_model.save_pretrained(model)
    pd.DataFrame({"prompt": ["~"], "response": ["x"]}).to_parquet(rows / "broken")
    return base.model_copy(update={"location": str(model)})


def test_a_loss_that_is_not_finite_names_the_adapter_and_its_siblings_go_on(
    train, breaking, tmp_path
):
    seen = []
    _, _, alone = train("separate", "alone", names=("birds",), on=breaking)
    with pytest.raises(NonFiniteLossError, match=r"loss of adapter 'broken' became nan at step 0"):
        train("together", "out", names=("birds", "broken"), on_event=seen.append, on=breaking)
    assert [event["name"] for event in seen] == ["birds"] * 27
    assert all(math.isfinite(event[key]) for event in seen for key in KEYS)
    assert not (tmp_path / "out" / "broken").exists()
    assert_same_adapters(alone, tmp_path / "out", ("birds",))


def test_a_broken_adapter_leaves_its_place_to_the_next(train, breaking, rows, tmp_path):
    seen = []
    pd.DataFrame({"prompt": ["~"] * 12, "response": ["x"] * 12}).to_parquet(rows / "broken")
    with pytest.raises(NonFiniteLossError, match=r"loss of adapter 'broken' became nan at step 0"):
        train(
            names=("cars", "broken", "birds"), on_event=seen.append, on=breaking, batch_size=1,
            epochs=1, adapters_at_once=1,
        )  # fmt: skip
    train(names=("birds", "cars"), folder="good", on=breaking, batch_size=1, epochs=1)
    assert [event["name"] for event in seen] == ["birds"] * 9 + ["cars"] * 5
    assert_same_adapters(tmp_path / "good", tmp_path / "out", ("birds", "cars"))


def test_stacked_products_are_taken_again_once_a_broken_adapter_has_left(
    train, breaking, tmp_path, monkeypatch
):
    """Computed twice in the step whose gradients are not finite, and in no other."""
    given = {"names": ("animals", "birds", "broken"), "max_steps": 4, "on": breaking}
    given["tokens_per_forward"] = 10_000  # one part a step
    _, _, alone = train("separate", "alone", **given | {"names": ("animals", "birds")})
    stacked, seen = partial(MixedLora, stacked=True), []
    monkeypatch.setattr("tclora.train.seats.MixedLora", stacked)
    monkeypatch.setattr(
        MixedLora, "rows", lambda self, *args: seen.append(self.stacked) or ROWS_OF(self, *args)
    )
    with pytest.raises(NonFiniteLossError, match=r"loss of adapter 'broken' became nan at step 0"):
        train("together", "out", **given)
    assert seen == [True, False, True, True, True]
    assert_same_adapters(alone, tmp_path / "out", ("animals", "birds"))


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


def test_in_a_job_of_its_own(base, rows, tmp_path):
    given = {
        "base": base,
        "config": AdapterConfig(**FAST | {"epochs": 3}),
        "checkpoint_steps": 5,
    }

    def requests(folder):
        return [
            AdapterRequest(
                name=name, rows=rows / name, target=tmp_path / folder / name,
                checkpoint=tmp_path / f"{folder}-{name}",
            )
            for name in ROWS
        ]  # fmt: skip

    events = []
    found = LocalExecutor().run_isolated(
        train_adapters, engine="together", requests=requests("job"), on_event=events.append, **given
    )
    wanted = train_adapters(engine="separate", requests=requests("here"), **given)
    assert_same_results(found, wanted)
    assert_same_adapters(tmp_path / "here", tmp_path / "job")
    assert len(events) == sum(result.steps for result in wanted.values())


SIZES = {"a": 5, "b": 50, "c": 30, "d": 20}


@pytest.mark.parametrize(
    ("gpus", "slots", "wanted"),
    [
        ("", 4, [["b", "c", "d", "a"]]),
        ("0", 4, [["b", "c", "d", "a"]]),
        ("0,1", 1, [["b", "c", "d", "a"]]),
        ("0,1", 2, [["b", "a"], ["c", "d"]]),
        ("0,1,2,3,4,5", 6, [["b"], ["c"], ["d"], ["a"]]),
    ],
)
def test_jobs_share_adapters_by_device(monkeypatch, gpus, slots, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert engines["together"].divide(SIZES, slots) == wanted


def test_separate_has_a_job_for_each():
    assert engines["separate"].divide(SIZES, 2) == [["b"], ["c"], ["d"], ["a"]]


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
