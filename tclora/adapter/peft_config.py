"""PEFT's ``adapter_config.json``: whether an update is B @ A alone, and times which scaling.

Symbols: α ``lora_alpha``, r a module's LoRA rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tclora.errors import AdapterError

CONFIG_FILE = "adapter_config.json"

# Options of a PEFT LoRA configuration that a plain update B @ A cannot express.
_INEXPRESSIBLE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)

# Initialisations that take a part out of the base weights: the adapter fits only what is left.
_CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
_CONVERT = (
    "save it from the model it was trained in with save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=…), which makes it a plain LoRA of the original base"
)


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a PEFT LoRA directory.

    Raises
    ------
    AdapterError
        If there is none, or it tells of what a plain LoRA of the original base is not.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(f"{path}: must be a PEFT LoRA directory, but has no {CONFIG_FILE}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file}: must be JSON, but {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type must be LORA, got {config.get('peft_type')!r}")
    set_options = [option for option in _INEXPRESSIBLE if config.get(option)]
    if config.get("bias", "none") != "none":
        set_options.append("bias")
    if set_options:
        raise AdapterError(
            f"{file}: {', '.join(set_options)} cannot be expressed as a low-rank update B @ A; "
            "only plain LoRA adapters can be factorised and merged"
        )
    _check_base(file, config.get("init_lora_weights"))
    return config


def _check_base(file: Path, initialisation: object) -> None:
    """Refuse an adapter whose initialisation changed the base weights it was trained on."""
    name = str(initialisation).lower()
    if name.startswith(_CHANGED_BASE):
        # PEFT converts all of them but LoftQ, which quantised the base itself.
        remedy = "train it again with another one" if name == "loftq" else _CONVERT
        raise AdapterError(
            f"{file}: init_lora_weights must leave the base weights as they are, got "
            f"{initialisation!r}, whose adapter fits only the base weights it changed; {remedy}"
        )


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return PEFT's scaling of one module: α/r, or α/√r for rsLoRA, after the pattern look-up."""
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that matches, or of the module's name itself."""
    patterns = patterns or {}
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(
                f"alpha_pattern must have regular expressions as keys, got {pattern!r}: {error}; "
                f"correct it in {CONFIG_FILE}"
            ) from error
        if matched:
            return value
    return patterns.get(module, default)


def plain_config(base_model: str | None, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of modules of these ranks, α = r throughout: scaling 1."""
    common, _ = Counter(ranks.values()).most_common(1)[0]
    pattern = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
