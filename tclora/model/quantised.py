"""A base of 4-bit weights to train adapters on (QLoRA), by bitsandbytes.

NF4 with double quantisation: 4 bits per weight of a linear layer, 8 per block of 64 and 32 per 256
blocks. All else keeps its type, the output layer too; products are computed in that type.

References
----------
.. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023.
"""

import importlib.util
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tclora.errors import ModelError

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight
NEEDED = "train.quantisation: 'nf4' needs bitsandbytes: pip install tclora[qlora]"


def installed() -> bool:
    """Return whether bitsandbytes is."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _present(device: str) -> str:
    """Return a device with its number: "cuda" alone is the first GPU to transformers."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def load_quantised(location: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Load a causal LM with its linear layers in NF4, in evaluation mode.

    Raises
    ------
    ModelError
        If bitsandbytes is missing or has nothing for the device, or the weights cannot be loaded.

    Notes
    -----
    PEFT's ``prepare_model_for_kbit_training`` is not needed: placing an adapter freezes the base,
    checkpointing is without re-entry, and norms in single precision, which it makes for fp16, would
    only widen what passes between the layers.
    """
    if not installed():
        raise ModelError(NEEDED)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": _present(device)},
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"base_model {location!r} cannot be loaded in 4 bits on {device!r}: {reason}; leave "
            "train.quantisation out"
        ) from error
    for module in model.modules():
        # On some CPUs a layer repacks its weights when it is first used without gradients, and has
        # none from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    loaded: PreTrainedModel = model.eval()
    return loaded
