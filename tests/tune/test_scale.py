import pytest
import torch

from tclora.merge import merge
from tclora.model.tokens import batches
from tclora.tune.scale import is_scaled, tune_scale
from tests.tune.small_model import ROWS, loss_of

SCALES = (0.1, 0.5, 2.0)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "tsv-m"])
def test_the_scale_of_lowest_loss_is_taken(small_model, small_adapters, tmp_path, method):
    seen = []
    found = tune_scale(
        small_model, small_adapters, method, list(batches(ROWS, pad_id=0)), SCALES, rank=2,
        progress=lambda scale, loss: seen.append((scale, loss)),
    )  # fmt: skip
    wanted = {}
    for scale in SCALES:
        merged = merge(small_adapters, method, rank=2, scale=scale).adapter
        wanted[scale] = loss_of(small_model, merged, tmp_path / f"{scale}")
    assert found.losses == pytest.approx(wanted, rel=1e-5)
    assert found.scale == min(wanted, key=wanted.get)
    assert dict(seen) == found.losses
    assert all(p.grad is None for p in small_model.parameters())


def test_what_has_no_scale_is_refused(small_model, small_adapters):
    rows = list(batches(ROWS, pad_id=0))
    assert is_scaled("ties")
    assert not is_scaled("uniform")
    with pytest.raises(ValueError, match="method must have a scale to tune, uniform has none"):
        tune_scale(small_model, small_adapters, "uniform", rows)
    with pytest.raises(ValueError, match="scales must be positive"):
        tune_scale(small_model, small_adapters, "ties", rows, (0.5, 0.0))


def test_the_model_is_left_as_it_was(small_model, small_adapters):
    ids = torch.tensor([[3, 4, 5]])
    before = small_model(input_ids=ids).logits
    tune_scale(small_model, small_adapters, "task-arithmetic", list(batches(ROWS, pad_id=0)))
    assert torch.equal(small_model(input_ids=ids).logits, before)
