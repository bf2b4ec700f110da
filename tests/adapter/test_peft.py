import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.adapter import read_adapter, write_adapter
from tclora.errors import AdapterError
from tests.merge.examples import assert_same_updates, make_adapter


@pytest.fixture
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip


def set_init(folder, value):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": value}))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq"]
)
def test_an_adapter_of_a_changed_base_is_refused_by_name_and_remedy(init, tmp_path):
    write_adapter(make_adapter("one"), tmp_path / "one")
    set_init(tmp_path / "one", init)
    remedy = "train it again" if init == "loftq" else "path_initial_model_for_weight_conversion"
    with pytest.raises(AdapterError, match=f"one.*init_lora_weights.*'{init}'.*{remedy}"):
        read_adapter(tmp_path / "one")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(init, tmp_path):
    adapter = make_adapter("one")
    write_adapter(adapter, tmp_path / "one", torch.float64)
    set_init(tmp_path / "one", init)
    assert_same_updates(read_adapter(tmp_path / "one"), adapter)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_pissa_adapter_is_the_change_of_the_original_base(base, tmp_path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"])
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterError, match="'pissa'"):
        read_adapter(tmp_path / "plain")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    merged = model.merge_and_unload().state_dict()
    read = read_adapter(tmp_path / "converted")
    assert {factors.rank for factors in read.modules.values()} == {4}
    for module, factors in read.modules.items():
        change = merged[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(factors.delta(), change, rtol=1e-3, atol=1e-5)


def test_what_is_written_loads_in_stock_peft(base, tmp_path):
    shapes = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.up_proj": (24, 16)}
    adapter = make_adapter("one", modules=shapes)
    write_adapter(adapter, tmp_path / "one")
    loaded = PeftModel.from_pretrained(base, tmp_path / "one")
    for module, factors in adapter.modules.items():
        layer = loaded.get_submodule(f"base_model.model.{module}")
        torch.testing.assert_close(
            layer.get_delta_weight("default"), factors.delta().float(), rtol=1e-4, atol=1e-4
        )
