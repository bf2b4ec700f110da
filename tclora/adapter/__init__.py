"""LoRA adapters as their factors, and the stock PEFT directories they live in."""

from tclora.adapter.factors import Adapter, LoraFactors
from tclora.adapter.peft import (
    WEIGHTS_FILE,
    locate_adapter,
    read_adapter,
    write_adapter,
)
from tclora.adapter.peft_config import CONFIG_FILE
from tclora.adapter.union import check_adapters, module_factors, module_names

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "LoraFactors",
    "check_adapters",
    "locate_adapter",
    "module_factors",
    "module_names",
    "read_adapter",
    "write_adapter",
]
