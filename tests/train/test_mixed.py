"""One product with the factors of all adapters against a product for each."""

import itertools
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tclora.config import AdapterConfig
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora

IDS = torch.arange(36).reshape(6, 6) % 50 + 4
CONFIG = AdapterConfig(r=4, alpha=8)


def mixed_lora(folder, *, stacked, shared=False, dropout=0.0, K=3):
    """Return a model with K adapters, B drawn at random, and their weights."""
    model = LlamaForCausalLM.from_pretrained(folder).train()
    draw = torch.Generator().manual_seed(0)
    weights = []
    first = fresh_weights(model, CONFIG, 0)
    for k in range(K):
        own = fresh_weights(model, CONFIG, k)
        for name, weight in own.items():
            if ".lora_B." in name:
                weight.data = 0.3 * torch.randn(weight.shape, generator=draw)
            elif shared:
                own[name] = first[name].requires_grad_(False)
        weights.append(own)
    mixed = MixedLora(model, weights, scaling=2.0, dropout=dropout, stacked=stacked)
    return model, mixed, weights


def outcome(folder, owners, **given):
    """Return logits, the gradients of all adapters and those of the embeddings."""
    model, mixed, weights = mixed_lora(folder, **given)
    embedded = model.get_input_embeddings()(IDS[: len(owners)]).detach().requires_grad_(True)
    for _ in range(2):  # gradients add up
        torch.manual_seed(5)
        with mixed.rows(owners):
            logits = model(inputs_embeds=embedded).logits
            logits.square().mean().backward()
    found = [w.grad.clone() for own in weights for w in own.values() if w.requires_grad]
    return [logits.detach(), *found, embedded.grad]


@pytest.mark.parametrize("owners", [[0, 0, 1, 2, 2, 2], [0, 2], [2, 2, 0, 0, 1], [1]], ids=str)
@pytest.mark.parametrize("given", [{}, {"shared": True}, {"dropout": 0.4}], ids=str)
def test_a_stacked_product_gives_what_slices_give(tiny_model_dir, owners, given):
    wanted, found = (
        outcome(tiny_model_dir, owners, stacked=stacked, **given) for stacked in (False, True)
    )
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_dropout_is_for_training_alone(tiny_model_dir):
    model, mixed, _ = mixed_lora(tiny_model_dir, stacked=False, dropout=0.4)

    def logits():
        with torch.no_grad(), mixed.rows([0, 1, 2]):
            return model(IDS[:3]).logits

    assert not torch.equal(logits(), logits())
    model.eval()
    assert torch.equal(logits(), logits())


def test_no_adapter_but_its_own_gets_a_gradient(tiny_model_dir):
    for stacked in (False, True):
        model, mixed, weights = mixed_lora(tiny_model_dir, stacked=stacked)
        with mixed.rows([0, 2, 2]):
            model(IDS[:3]).logits.square().mean().backward()
        sizes = [sum(float(w.grad.abs().sum()) for w in own.values()) for own in weights]
        assert sizes[1] == 0
        assert min(sizes[0], sizes[2]) > 0


def test_apart_from_others_nothing_that_is_not_finite_reaches_them(tiny_model_dir):
    model, mixed, weights = mixed_lora(tiny_model_dir, stacked=True)
    bad = next(weight for name, weight in weights[1].items() if ".lora_B." in name)
    bad.data.fill_(math.nan)

    def gradients():
        for weight in itertools.chain.from_iterable(own.values() for own in weights):
            weight.grad.zero_()
        with mixed.rows([0, 1, 2]):
            model(IDS[:3]).logits.square().mean((1, 2)).sum().backward()
        return [all(bool(w.grad.isfinite().all()) for w in own.values()) for own in weights]

    assert gradients() != [True, False, True]
    assert not mixed.finite()
    with mixed.apart():
        assert gradients() == [True, False, True]
    assert mixed.stacked
