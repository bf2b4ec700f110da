"""Placing a fresh LoRA adapter in a model."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.errors import ModelError


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


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """List the distinct last names of the model's linear layers."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
