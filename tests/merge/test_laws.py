"""Laws that every registered merge method must obey."""

import json
import warnings

import pytest
import torch

from tclora.adapter import Adapter, LoraFactors, read_adapter, write_adapter
from tclora.errors import AdapterError
from tclora.merge import merge, methods
from tests.merge.examples import NAMES, assert_same_updates, deltas, make_adapter, make_statistics

METHODS = [info.name for info in methods()]
# What depends on how an update was split into B and A: as published, so by default.
BY_SPLIT = {"pico", "regmean-drift", "tc-lora-drift"}
NEEDED = {
    "tc-lora-calibrated": {"loadings": dict(zip(NAMES, (0.5, 0.2, 0.4), strict=True))},
    "tc-lora-reconstruct": {"cluster": "law"},
}
# Options that switch off what a method does on purpose: scaling, trimming, dropping.
NEUTRAL = {
    "compress-then-merge": {"density": 1},
    "core-space": {"density": 1},
    "dare": {"density": 1},
    "dare-ties": {"density": 1},
    "knots-dare": {"density": 1},
    "magnitude-pruning": {"density": 1},
    "task-arithmetic": {"scale": 1},
    "tc-lora-calibrated": {"loadings": {"one": 1}},
    "tc-lora-sum": {"scale": 1},
    "ties": {"density": 1},
}
# Isotropic merging flattens the spectrum of a single adapter too.
NO_IDENTITY = {"iso-c", "iso-cts"}
# Results of an iterative solver are equal up to its tolerance; dense merges are single precision.
ITERATIVE = {name for name in METHODS if name.startswith("tc-lora")}
RANDOM = {"dare", "dare-ties", "knots-dare"}


def run(adapters, method, **options):
    return merge(
        adapters, method, statistics=make_statistics(), **{**NEEDED.get(method, {}), **options}
    )


def tolerance(method):
    return 2e-2 if method in ITERATIVE else 1e-5


@pytest.mark.parametrize("method", sorted(set(METHODS) - NO_IDENTITY))
@pytest.mark.parametrize("rank", [None, 3])
def test_one_adapter_merges_to_itself(method, rank):
    one = make_adapter("one", seed=4)
    merged = merge(
        [one],
        method,
        rank=rank,
        statistics=make_statistics(names=("one",)),
        **NEUTRAL.get(method, {}),
    )
    assert_same_updates(merged.adapter, one, 1e-5)
    assert merged.truncation_loss < 1e-10


@pytest.mark.parametrize("method", sorted(set(METHODS) - BY_SPLIT))
def test_splitting_an_update_differently_changes_nothing(method, adapters):
    M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    split = [
        Adapter(
            a.name,
            {m: LoraFactors(f.B @ M, torch.linalg.solve(M, f.A)) for m, f in a.modules.items()},
            a.base_model,
        )
        for a in adapters
    ]
    assert_same_updates(
        run(split, method).adapter, run(adapters, method).adapter, tolerance(method)
    )


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_not_finite_are_refused(method, adapters):
    adapters[1].modules["layers.0.q"].A[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"law: factors of layers\.0\.q must be finite"):
        run(adapters, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["alpha", "rslora", "pattern"])
def test_every_form_of_scaling_is_the_same_update(method, form, adapters, tmp_path):
    forms = {
        "alpha": ({"lora_alpha": 12}, 12 / 3),
        "rslora": ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        "pattern": ({"alpha_pattern": {"layers.*": 1.5}}, 0.5),
    }
    settings, scaling = forms[form]
    read = []
    for one in adapters:
        scaled = {m: LoraFactors(f.B / scaling, f.A) for m, f in one.modules.items()}
        write_adapter(Adapter(one.name, scaled, "base"), tmp_path / one.name, torch.float64)
        file = tmp_path / one.name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        read.append(read_adapter(tmp_path / one.name))
    assert_same_updates(run(read, method).adapter, run(adapters, method).adapter, tolerance(method))


@pytest.mark.parametrize("method", METHODS)
def test_no_input_is_changed_and_results_repeat(method, adapters):
    before = [{m: (f.B.clone(), f.A.clone()) for m, f in a.modules.items()} for a in adapters]
    statistics = make_statistics()
    grams = statistics.of("layers.0.q", NAMES)
    options = NEEDED.get(method, {})
    one, two = (merge(adapters, method, statistics=statistics, **options) for _ in range(2))
    for module in one.adapter.modules:
        assert torch.equal(one.adapter.modules[module].B, two.adapter.modules[module].B)
        assert torch.equal(one.adapter.modules[module].A, two.adapter.modules[module].A)
    assert torch.equal(statistics.of("layers.0.q", NAMES), grams)
    for adapter, kept in zip(adapters, before, strict=True):
        for module, (B, A) in kept.items():
            assert torch.equal(adapter.modules[module].B, B)
            assert torch.equal(adapter.modules[module].A, A)


@pytest.mark.parametrize("method", sorted(set(METHODS) - RANDOM))
def test_order_of_adapters_does_not_matter(method, adapters):
    one, two = run(adapters, method), run(adapters[::-1], method)
    assert_same_updates(one.adapter, two.adapter, tolerance(method))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_ranks_and_targets(method, mixed_adapters):
    merged = run(mixed_adapters, method)
    assert merged.adapter.modules.keys() == mixed_adapters[0].modules.keys()
    for module, delta in deltas(merged.adapter).items():
        assert torch.isfinite(delta).all(), module


@pytest.mark.parametrize("method", METHODS)
def test_zero_adapters_merge_to_finite_factors(method, adapters):
    zeros = [
        Adapter(a.name, {m: LoraFactors(0 * f.B, f.A) for m, f in a.modules.items()}, "base")
        for a in adapters
    ]
    for some in ([*zeros[:1], *adapters[1:]], zeros):
        merged = run(some, method).adapter
        assert all(torch.isfinite(delta).all() for delta in deltas(merged).values())
        assert all(factors.rank > 0 for factors in merged.modules.values())  # as PEFT demands


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 4])
def test_rank_is_honoured_and_reported(method, rank, adapters):
    full, merged = run(adapters, method), run(adapters, method, rank=rank)
    assert merged.rank <= rank
    assert all(f.rank <= rank for f in merged.adapter.modules.values())
    assert 0 <= merged.truncation_loss <= 1
    assert merged.parameters == sum(
        f.B.numel() + f.A.numel() for f in merged.adapter.modules.values()
    )
    own = method in ITERATIVE or method in {"svd", "compress-then-merge"}  # r unless asked for
    assert full.rank >= merged.rank or own


def disturbed(adapters):
    """Return the adapters with a relative noise of 1e-12 in every factor."""
    generator = torch.Generator().manual_seed(1)

    def noisy(x):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + 1e-12 * x.norm() / noise.norm().clamp_min(1e-300) * noise

    return [
        Adapter(
            a.name,
            {m: LoraFactors(noisy(f.B), noisy(f.A)) for m, f in a.modules.items()},
            a.base_model,
        )
        for a in adapters
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 1, 3, 5, 9])
def test_rounding_of_the_input_is_not_amplified(method, rank, adapters):
    one, two = (run(some, method, rank=rank) for some in (adapters, disturbed(adapters)))
    assert_same_updates(two.adapter, one.adapter, 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 3])
def test_rounding_is_not_amplified_where_updates_are_degenerate(method, rank, adapters):
    """One input factor for all, as in training with a frozen A, and an update of lower rank."""
    A = adapters[0].modules
    some = [
        Adapter(a.name, {m: LoraFactors(f.B, A[m].A) for m, f in a.modules.items()}, a.base_model)
        for a in adapters
    ]
    for factors in some[1].modules.values():
        factors.B[:, 2] = factors.B[:, 1]
    one, two = (run(each, method, rank=rank) for each in (some, disturbed(some)))
    assert_same_updates(two.adapter, one.adapter, 1e-6)


@pytest.fixture(scope="module")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_result_reloads_in_stock_peft_with_the_same_update(method, tiny_llama, tmp_path):
    from peft import PeftModel

    shapes = {
        "model.layers.0.self_attn.q_proj": (16, 16),
        "model.layers.0.mlp.up_proj": (24, 16),
    }
    adapters = [make_adapter(name, modules=shapes, seed=k) for k, name in enumerate(NAMES)]
    options = NEEDED.get(method, {})
    statistics = make_statistics(modules=shapes)
    merged = merge(adapters, method, statistics=statistics, **options)
    write_adapter(merged.adapter, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama, tmp_path / "merged", adapter_name=method)
    for module, delta in deltas(merged.adapter).items():
        loaded = model.base_model.model.get_submodule(module).get_delta_weight(method)
        torch.testing.assert_close(loaded, delta.float(), atol=1e-5, rtol=1e-5)
    model.unload()
