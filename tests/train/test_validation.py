"""Rows that are watched in training: the best adapter is kept, and resumed from."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tclora.config import AdapterConfig
from tclora.files import sha256_path
from tclora.model.loss import response_nll
from tclora.model.tokens import batches
from tclora.train.course import hold_out, total_steps
from tclora.train.records import Checkpoint
from tests.train.several import StopHereError
from tests.train.single import FAST, WATCHED, rows, train

__all__ = ["rows", "train"]


def held_out(rows, fraction):
    return tuple([rows[place] for place in part] for part in hold_out(len(rows), fraction, 0))


def test_the_adapter_of_the_lowest_validation_loss_is_kept(train, tiny_model_dir, rows):
    kept, watched = held_out(rows, 0.34)
    assert (len(kept), len(watched)) == (4, 2)
    result, target = train(epochs=12, **WATCHED)
    seen = {r["step"]: r["validation_nll"] for r in result.history if "validation_nll" in r}
    assert list(seen) == [1, 3, 5, 7, 9, 11]
    assert result.validation_nll == min(seen.values()) < seen[11]  # it overfits four rows
    best = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_dir), target)
    with torch.no_grad():
        (batch,) = batches(watched, pad_id=0)
        nll = response_nll(best.eval(), batch).sum() / batch.supervised
    assert nll.item() == pytest.approx(result.validation_nll, rel=1e-4)


def test_rows_held_out_are_not_trained_on(train, rows):
    kept, _ = held_out(rows, 0.34)
    watched, alone = train("a", **WATCHED), train("b", on=kept)
    losses = [[record["loss"] for record in result.history] for result, _ in (watched, alone)]
    assert losses[0] == losses[1]
    assert watched[0].steps == total_steps(len(rows), AdapterConfig(**FAST | WATCHED))


def test_training_stops_when_the_validation_loss_has_stopped_falling(train):
    result, _ = train(epochs=60, patience=2, **WATCHED)
    seen = [r["validation_nll"] for r in result.history if "validation_nll" in r]
    assert len(seen) - 1 - seen.index(min(seen)) == 2
    assert result.steps < 60


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_training_keeps_its_best(train, tmp_path, stop):
    changes = {"epochs": 60, "patience": 2, **WATCHED}
    whole, target = train("whole", **changes)
    assert whole.steps > stop

    def interrupt(record):
        if record["step"] == stop:
            raise StopHereError

    place = Checkpoint(tmp_path / "checkpoint", 2)
    with pytest.raises(StopHereError):
        train("cut", **changes, options={"checkpoint": place, "on_step": interrupt})
    resumed, again = train("cut", **changes, options={"checkpoint": place})
    assert sha256_path(again) == sha256_path(target)
    assert resumed.validation_nll == whole.validation_nll
    repeated, again = train("cut", **changes, options={"checkpoint": place})
    assert repeated.steps == whole.steps
    assert sha256_path(again) == sha256_path(target)


def _lose_a_moment(folder):
    tensors = load_file(folder / "state.safetensors")
    del tensors[max(name for name in tensors if name.startswith("exp_avg_sq/"))]
    save_file(tensors, folder / "state.safetensors")


def _cut_a_best(folder):
    tensors = load_file(folder / "state.safetensors")
    name = max(name for name in tensors if name.startswith("best/"))
    save_file(tensors | {name: tensors[name][:1].clone()}, folder / "state.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        _lose_a_moment,
        _cut_a_best,
        lambda folder: (folder / "history.json").write_text("[{"),
        lambda folder: (folder / "history.json").write_text("{}"),
        lambda folder: (folder / "history.json").unlink(),
    ],
    ids=["moment", "best", "cut history", "other history", "no history"],
)
def test_from_a_damaged_checkpoint_nothing_is_taken(train, tmp_path, damage, caplog):
    changes = {"epochs": 3, **WATCHED}
    whole, target = train("whole", **changes)
    place = Checkpoint(tmp_path / "checkpoint", 2)
    train("cut", **changes, lr=0.3, options={"checkpoint": place})  # of other weights
    damage(place.folder)
    again, other = train("cut", **changes, options={"checkpoint": place})
    assert "cannot be read, training starts afresh" in caplog.text
    assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (other / name).read_bytes() == (target / name).read_bytes()


def test_patience_needs_rows_to_watch():
    with pytest.raises(ValueError, match="patience must come with a validation_fraction above 0"):
        AdapterConfig(patience=2)


def test_one_row_is_never_held_out():
    assert hold_out(1, 0.5, 0) == ([0], [])
    assert hold_out(6, 0, 0) == ([0, 1, 2, 3, 4, 5], [])
    assert [len(part) for part in hold_out(6, 0.99, 0)] == [1, 5]
