"""The short forward pass against PEFT's own, on the layers of a real model."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tclora.route import Gating
from tests.route.test_gating import IDS, loaded, logits

MIXED = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.2, 0.5, 0.3], [0, 1, 0]])


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def short_passes(model, **kwargs):
    """Count the layers that took the short way in one forward pass."""
    with Operations() as operations:
        model(input_ids=IDS, **kwargs)
    return operations.names.count("addmm_.default")


@pytest.fixture
def peft_model(tiny_model, gated, tmp_path):
    return loaded(tiny_model, gated.adapter, tmp_path / "static")


@pytest.fixture
def gating(peft_model, gated):
    return Gating(peft_model, gated)


def short_and_peft(model, gated, context):
    """Return a batch's logits by the short pass and by PEFT's, which runs where gradients do."""
    with context:
        by_peft = model(input_ids=IDS).logits.detach()
        with torch.no_grad():
            assert short_passes(model) == len(gated.gates)
            short = model(input_ids=IDS).logits
    assert short.dtype == by_peft.dtype
    return short, by_peft


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_the_short_pass_gives_what_peft_gives(peft_model, gated, dtype, share):
    gating = Gating(peft_model.to(dtype), gated)
    short, by_peft = short_and_peft(peft_model, gated, gating.applied(MIXED))
    assert short.dtype == dtype
    assert (short - by_peft).norm() <= share * by_peft.norm()


def test_gates_per_token_take_the_short_pass_too(gating, peft_model, gated):
    short, by_peft = short_and_peft(peft_model, gated, gating.applied_per_token(top_k=2))
    assert torch.allclose(short, by_peft, atol=1e-5)


@torch.no_grad()
def test_the_scaling_in_force_counts(gating, peft_model, gated):
    with gating.applied(MIXED):
        before = logits(peft_model)
        for layer in peft_model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.5)
        halved = logits(peft_model)
        with torch.enable_grad():
            by_peft = peft_model(input_ids=IDS).logits
    assert torch.allclose(halved, by_peft, atol=1e-5)
    assert (halved - before).abs().max() > 0.1


@torch.no_grad()
def test_peft_runs_where_the_short_pass_would_differ(gating, peft_model, gated):
    every = len(gated.gates)
    assert short_passes(peft_model) == every  # by the static gate
    with gating.applied(MIXED):
        assert short_passes(peft_model) == every
        with torch.enable_grad():
            assert short_passes(peft_model) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert short_passes(peft_model) == 0
        with peft_model.disable_adapter():
            assert short_passes(peft_model) == 0
        peft_model.train()
        assert short_passes(peft_model) == 0
        peft_model.eval()
        assert short_passes(peft_model) == every
