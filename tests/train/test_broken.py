"""Adapters whose loss is no number any more: named and left out, the others go on."""

import math
import shutil
from functools import partial

import pandas as pd
import pytest
import torch

from tclora.errors import NonFiniteLossError
from tclora.train.mixed import MixedLora
from tests.train.several import KEYS, assert_same_adapters, base, rows, train

__all__ = ["base", "rows", "train"]
ROWS_OF = MixedLora.rows


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
