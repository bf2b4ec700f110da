"""Our reader of adapter configurations against PEFT's own: every field, every pattern."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from tclora.adapter import Adapter, LoraFactors, read_adapter, write_adapter
from tclora.errors import AdapterError

# What the reader looks at; the ranks themselves are read off the tensors.
READ = {
    "alpha_pattern", "base_model_name_or_path", "init_lora_weights", "lora_alpha", "peft_type",
    "use_rslora",
}  # fmt: skip
# What a plain update B @ A cannot express, each with a value other than its default.
REFUSED = {
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 2},
    "bias": "lora_only",
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [7],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
}
# What changes neither the update of a module nor which tensors are stored for it.
HARMLESS = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "corda_config": {"corda_method": "kpm"},  # used with init_lora_weights alone, like its like
    "ensure_weight_tying": True,  # tied embeddings are stored under names that are refused
    "eva_config": {"rho": 3.0},
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,  # how the base stores its weight; B @ A is applied alike
    "inference_mode": False,
    "layers_pattern": "layers",
    "layers_to_transform": [0, 1],
    "loftq_config": {"loftq_bits": 8},
    "lora_dropout": 0.1,
    "lora_ga_config": {"direction": "ArBr"},
    "megatron_config": {"tensor_parallel": 1},
    "megatron_core": "megatron",
    "peft_version": "0.1.0",
    "qalora_group_size": 32,
    "r": 64,
    "rank_pattern": {"q_proj": 64},
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_modules": ".*",
    "task_type": "SEQ_CLS",
}
MODULE = "model.layers.1.self_attn.q_proj"
PATTERNS = {
    "name": {"q_proj": 3.0},
    "part of a name": {"proj": 3.0},
    "part of the path": {"layers.1": 3.0},
    "path": {"layers.1.self_attn.q_proj": 3.0},
    "whole path": {MODULE: 3.0},
    "other layer": {"layers.11.self_attn.q_proj": 3.0},
    "dot stands for any character": {"layers.1.self.attn.q.proj": 3.0},
    "end of another name": {"attn.q_proj": 3.0},
    "alternatives": {"k_proj|q_proj": 3.0},
    "alternative paths": {"mlp|self_attn.q_proj": 3.0},
    "class of characters": {r"layers\.[0-3]\..*": 3.0},
    "anchored": {"^model.layers.1.self_attn.q_proj": 3.0},
    "anchored amid": {"^q_proj": 3.0},
    "anchored end": {"q_proj$": 3.0},
    "the first of two": {"q_proj": 3.0, MODULE: 5.0},
    "the second of two": {"v_proj": 5.0, ".*q_proj": 3.0},
    "empty": {"": 3.0},
    "none": {},
}


def write(folder, module=MODULE, **options):
    generator = torch.Generator().manual_seed(0)
    factors = LoraFactors(
        torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator)
    )
    write_adapter(Adapter("one", {module: factors}, "base"), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return factors.delta()


def test_every_field_of_the_installed_peft_is_accounted_for():
    known = READ | REFUSED.keys() | HARMLESS.keys()
    assert sorted({field.name for field in fields(LoraConfig)} - known) == []
    assert len(known) == len(READ) + len(REFUSED) + len(HARMLESS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plain_update_cannot_express_is_refused_by_name(name, tmp_path):
    write(tmp_path / "one", **{name: REFUSED[name]})
    with pytest.raises(AdapterError, match=rf"{name} cannot be expressed"):
        read_adapter(tmp_path / "one")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_change_the_update_is_passed_over(name, tmp_path):
    wanted = write(tmp_path / "one", **{name: HARMLESS[name]})
    torch.testing.assert_close(read_adapter(tmp_path / "one").modules[MODULE].delta(), wanted)


def test_defaults_of_peft_are_a_plain_update(tmp_path):
    defaults = LoraConfig(base_model_name_or_path="base", lora_alpha=2).to_dict()
    stored = json.loads(json.dumps(defaults, default=str))
    wanted = write(tmp_path / "one", **stored)
    torch.testing.assert_close(read_adapter(tmp_path / "one").modules[MODULE].delta(), wanted)


@pytest.mark.parametrize("module", [MODULE, "q_proj", "layers.1", "model.layers.11.mlp.q_proj"])
@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_patterns_choose_what_peft_chooses(patterns, module, tmp_path):
    plain = write(tmp_path / "one", module, lora_alpha=7, alpha_pattern=patterns)
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), 7)
    found = read_adapter(tmp_path / "one").modules[module].delta()
    torch.testing.assert_close(found, plain * alpha / 2)


def test_a_name_that_does_not_match_itself_is_looked_up(tmp_path):
    """As PEFT falls back to the name; an expression such as "a+b" does not match "a+b"."""
    plain = write(tmp_path / "one", "layers.a+b", lora_alpha=7, alpha_pattern={"layers.a+b": 3})
    found = read_adapter(tmp_path / "one").modules["layers.a+b"].delta()
    torch.testing.assert_close(found, plain * 3 / 2)


def test_a_pattern_that_is_no_expression_is_named(tmp_path):
    write(tmp_path / "one", alpha_pattern={"q_proj(": 3})
    with pytest.raises(AdapterError, match=r"alpha_pattern must have .*'q_proj\('"):
        read_adapter(tmp_path / "one")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_are_those_of_the_layers_that_peft_builds(use_rslora, tmp_path):
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(6, 5), "up": nn.Linear(6, 9)}) for _ in range(12)
    )
    config = LoraConfig(
        r=4, lora_alpha=5, use_rslora=use_rslora, init_lora_weights=False,
        target_modules=["q_proj", "up"],
        rank_pattern={"1.q_proj": 2, r"\d+\.up": 3, "11.up": 1},
        alpha_pattern={"up": 7, "^0.1.q_proj": 11, "0.q_proj|2.q_proj": 13},
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(layers), config)
    model.save_pretrained(tmp_path / "one")
    read = read_adapter(tmp_path / "one")
    assert len(read.modules) == 24
    for module, factors in read.modules.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert factors.rank == layer.r["default"]
        torch.testing.assert_close(factors.delta(), layer.get_delta_weight("default"))
