from dataclasses import replace

import pytest
import torch

from tclora.merge import merge
from tclora.route import Fallback
from tclora.route.gates import gate_equations
from tclora.tune.fallback import choose_fallback
from tests.tune.small_model import ROWS, loss_of

SPREADS, SCALES = (0.0, 1.0), (0.25, 1.0)


@pytest.fixture
def fit(small_adapters):
    return gate_equations(small_adapters, merge(small_adapters, "tc-lora-mean", rank=4).adapter)


@pytest.fixture
def rows(fit):
    return dict(zip(fit.unit.names, (ROWS[:1], ROWS[1:]), strict=True))


def test_losses_are_those_of_gates_made_without_the_rows_cluster(fit, rows, small_model, tmp_path):
    seen = {}
    found = choose_fallback(
        small_model, fit, rows, spreads=SPREADS, scales=SCALES, progress=seen.__setitem__
    )
    for number, (rule, loss) in enumerate(found.losses):
        wanted, own = 0.0, list(rows.values())
        for k in range(2):
            fallback = fit.fallback(rule, without=k)
            alone = replace(fit.gated(), fallback=fallback).blended(1.0).adapter
            wanted += loss_of(small_model, alone, tmp_path / f"{number}-{k}", own[k]) / 2
        assert loss == pytest.approx(wanted, rel=1e-4)
        assert seen[rule] == loss
    assert dict(found.losses)[found.rule] == min(loss for _, loss in found.losses)


def test_the_model_is_left_as_it_was(fit, rows, small_model):
    ids = torch.tensor([[3, 4, 5]])
    before = small_model(input_ids=ids).logits
    choose_fallback(small_model, fit, rows, spreads=SPREADS, scales=SCALES)
    assert torch.equal(small_model(input_ids=ids).logits, before)


def test_one_cluster_has_none_to_leave_out(small_adapters, rows, small_model):
    alone = small_adapters[:1]
    fit = gate_equations(alone, merge(alone, "tc-lora-mean", rank=2).adapter)
    assert fit.fallback(Fallback())
    with pytest.raises(ValueError, match="two clusters or more, got one"):
        choose_fallback(small_model, fit, rows)
