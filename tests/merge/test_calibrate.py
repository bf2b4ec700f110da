import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.merge import calibrate_components, calibrate_loadings, merge
from tclora.prompts import TokenRow, batches
from tclora.tensor import factorise

from .examples import make_adapter

MODULES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
    "model.layers.1.mlp.up_proj": (24, 16),
}
ROWS = [TokenRow((3, 4, 5), (8, 9, 2)), TokenRow((9, 7), (10, 2)), TokenRow((5, 5, 6), (6, 2))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def adapters():
    raw = [make_adapter(n, modules=MODULES, seed=k) for k, n in enumerate(("law", "prose"))]
    return [
        Adapter(a.name, {m: LoraFactors(0.2 * f.B, f.A) for m, f in a.modules.items()}) for a in raw
    ]


def loss_of(model, adapter, folder):
    from peft import PeftModel

    from tclora.loss import response_nll

    write_adapter(adapter, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, folder).eval()
    total = tokens = 0
    with torch.inference_mode():
        for batch in batches(ROWS, pad_id=0):
            total += float(response_nll(tuned, batch).sum())
            tokens += batch.supervised
    tuned.unload()
    return total / tokens


def test_components_lower_the_loss_that_stock_peft_measures(model, adapters, tmp_path):
    merged = merge(adapters, "svd").adapter
    fit = calibrate_components(model, merged, list(batches(ROWS, pad_id=0)), n_steps=8)
    assert fit.losses[0] == pytest.approx(loss_of(model, merged, tmp_path / "before"), rel=1e-4)
    assert min(fit.losses) == pytest.approx(loss_of(model, fit.adapter, tmp_path / "x"), rel=1e-4)
    assert min(fit.losses) < fit.losses[0]
    assert len(fit.losses) == 9


def test_loadings_are_what_the_registered_method_takes(model, adapters, tmp_path):
    factors = factorise(adapters, 4)
    rows = list(batches(ROWS, pad_id=0))
    fit = calibrate_loadings(model, factors, rows, n_steps=8)
    assert min(fit.losses) < fit.losses[0]
    assert fit.losses[0] == pytest.approx(
        loss_of(model, merge(adapters, "tc-lora", factors=factors).adapter, tmp_path / "mean"),
        rel=1e-4,
    )
    merged = merge(adapters, "tc-lora-calibrated", factors=factors, loadings=fit.loadings)
    assert loss_of(model, merged.adapter, tmp_path / "x") == pytest.approx(
        min(fit.losses), rel=1e-4
    )


def test_the_base_model_is_left_as_it_was(model, adapters):
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = merge(adapters, "svd").adapter
    calibrate_components(model, merged, list(batches(ROWS, pad_id=0)), n_steps=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not any(m._forward_hooks for m in model.modules())
