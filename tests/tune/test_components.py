import pytest
import torch

from tclora.merge import merge
from tclora.tensor import factorise
from tclora.tune.components import fit_components, fit_loadings
from tests.tune.small_model import ROWS, loss_of


def test_components_lower_the_loss_that_stock_peft_measures(small_model, small_adapters, tmp_path):
    merged = merge(small_adapters, "svd").adapter
    fit = fit_components(small_model, merged, ROWS, n_steps=8)
    assert fit.losses[0] == pytest.approx(
        loss_of(small_model, merged, tmp_path / "before"), rel=1e-4
    )
    assert min(fit.losses) == pytest.approx(
        loss_of(small_model, fit.adapter, tmp_path / "x"), rel=1e-4
    )
    assert min(fit.losses) < fit.losses[0]
    assert len(fit.losses) == 9


def test_loadings_are_what_the_registered_method_takes(small_model, small_adapters, tmp_path):
    factors = factorise(small_adapters, 4)
    fit = fit_loadings(small_model, factors, ROWS, n_steps=8)
    assert min(fit.losses) < fit.losses[0]
    assert fit.losses[0] == pytest.approx(
        loss_of(
            small_model,
            merge(small_adapters, "tc-lora-mean", factors=factors).adapter,
            tmp_path / "mean",
        ),
        rel=1e-4,
    )
    merged = merge(small_adapters, "tc-lora-calibrated", factors=factors, loadings=fit.loadings)
    assert loss_of(small_model, merged.adapter, tmp_path / "x") == pytest.approx(
        min(fit.losses), rel=1e-4
    )


def test_the_base_model_is_left_as_it_was(small_model, small_adapters):
    before = {name: p.clone() for name, p in small_model.named_parameters()}
    merged = merge(small_adapters, "svd").adapter
    fit_components(small_model, merged, ROWS, n_steps=1)
    for name, parameter in small_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not any(m._forward_hooks for m in small_model.modules())
