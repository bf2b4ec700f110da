import pytest
import torch

from benchmarks.layerwise import merge_by_layers
from tclora.activations import ActivationStatistics
from tclora.activations.collect import collect
from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tclora.model.attach import attached
from tests.tune.small_model import MODULES, ROWS, make_model, make_model_adapters

CLUSTERS = {"law": ROWS[:2], "prose": ROWS[1:]}


def dense_regmean(model, adapters):
    """RegMean++ on dense updates: inputs of a module from the merged layers and one's own layer."""
    merged, settled = {}, {}
    for layer in ("model.layers.0.", "model.layers.1."):
        names = [name for name in MODULES if name.startswith(layer)]
        grams = {name: [] for name in names}
        for adapter in adapters:
            own = {m: adapter.modules[m] for m in names}
            inputs = {}
            handles = [
                model.get_submodule(m).register_forward_pre_hook(
                    lambda _, args, m=m, inputs=inputs: inputs.setdefault(m, []).append(args[0][0])
                )
                for m in names
            ]
            with torch.no_grad(), attached(model, Adapter("x", {**settled, **own}, None)):
                for row in CLUSTERS[adapter.name]:
                    model(input_ids=torch.tensor([row.prompt + row.response]))
            for handle in handles:
                handle.remove()
            for m in names:
                x = torch.cat(inputs[m]).double()
                gram = x.mT @ x / len(x)
                grams[m].append(0.9 * gram + 0.1 * gram.diagonal().diag())
        for m in names:
            total = sum(
                a.modules[m].delta().double() @ g for a, g in zip(adapters, grams[m], strict=True)
            )
            merged[m] = total @ torch.linalg.inv(sum(grams[m]))
            settled[m] = LoraFactors(merged[m].float(), torch.eye(merged[m].shape[1]))
    return merged


def test_regmean_by_layers_is_regmean_plus_plus():
    model, adapters = make_model(), make_model_adapters()
    found = merge_by_layers(model, adapters, CLUSTERS, "regmean", pad_id=0)
    wanted = dense_regmean(model, adapters)
    for module, delta in wanted.items():
        error = (found.modules[module].delta().double() - delta).norm() / delta.norm()
        assert error < 1e-3, (module, float(error))


def test_the_layers_below_matter_and_the_first_layer_is_that_of_own_activations():
    model, adapters = make_model(), make_model_adapters()
    found = merge_by_layers(model, adapters, CLUSTERS, "regmean", pad_id=0, rank=2)
    parts = []
    for adapter in adapters:
        with attached(model, adapter):
            parts.append(
                collect(model, CLUSTERS[adapter.name], adapter.name, list(MODULES), pad_id=0)
            )
    statistics = ActivationStatistics(
        parts[0].groups,
        {k: v for part in parts for k, v in part.grams.items()},
        {k: v for part in parts for k, v in part.tokens.items()},
    )
    own = merge(adapters, "regmean", statistics=statistics, rank=2).adapter
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    assert torch.allclose(found.modules[first].delta(), own.modules[first].delta(), atol=1e-5)
    assert not torch.allclose(found.modules[last].delta(), own.modules[last].delta(), atol=1e-3)
    assert list(found.modules) == sorted(MODULES)
    assert max(factors.rank for factors in found.modules.values()) == 2


def test_the_model_is_left_as_it_was():
    model, ids = make_model(), torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    merge_by_layers(model, make_model_adapters(), CLUSTERS, "tc-lora-activation", pad_id=0, rank=2)
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(ValueError, match="did you mean regmean"):
        merge_by_layers(model, make_model_adapters(), CLUSTERS, "regmen", pad_id=0)
