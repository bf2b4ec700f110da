"""Placing a fresh LoRA adapter in a model, and PEFT's names of its weights."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from tclora.adapter.peft import MODULE_PREFIX
from tclora.config import AdapterConfig
from tclora.errors import ModelError

A_WEIGHT, B_WEIGHT = ".lora_A.default.weight", ".lora_B.default.weight"


def attach_lora(model: PreTrainedModel, config: AdapterConfig, seed: int) -> PeftModel:
    """Inject a fresh LoRA adapter into the model.

    Raises
    ------
    ModelError
        If `config.target_modules` matches no module; the message lists what could be targeted.
    """
    targets = config.target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(
                f"train.target_modules {targets!r} matches no linear layer of the base model; "
                f"its layers are {linear_layer_names(model)}"
            ) from error
    return peft_model


def fresh_weights(
    model: PreTrainedModel, config: AdapterConfig, seed: int
) -> dict[str, nn.Parameter]:
    """Return the weights `attach_lora` would place, by PEFT's names; the model stays plain.

    PEFT leaves those on 4-bit weights in single precision; here they have the type of the products.

    Raises
    ------
    ModelError
        See `attach_lora`.
    """
    peft_model = attach_lora(model, config, seed)
    weights = {name: w for name, w in peft_model.named_parameters() if w.requires_grad}
    peft_model.unload()
    if getattr(model, "is_loaded_in_4bit", False):
        return {name: nn.Parameter(w.detach().to(model.dtype)) for name, w in weights.items()}
    return weights


def module_of(weight: str) -> str:
    """Return the path, in the plain model, of the module that a weight of PEFT's name updates."""
    return weight.removeprefix(MODULE_PREFIX).removesuffix(A_WEIGHT).removesuffix(B_WEIGHT)


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """List the distinct last names of the model's linear layers."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
