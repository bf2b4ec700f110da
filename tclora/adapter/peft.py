"""Stock PEFT directories: adapters are read from them module by module and written to them.

A module's update is Δ = B @ A. PEFT's scaling (α/r, α/√r for rsLoRA, rank and alpha patterns) is
folded into B on reading; nothing downstream sees a scaling again, and written adapters carry
scaling 1 (α = r).

Symbols: d_out × d_in the module's weight, r its LoRA rank.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tclora.adapter.factors import Adapter, LoraFactors
from tclora.adapter.peft_config import CONFIG_FILE, plain_config, read_config, scaling_of
from tclora.errors import AdapterError
from tclora.files import atomic_path

WEIGHTS_FILE = "adapter_model.safetensors"
MODULE_PREFIX = "base_model.model."  # of every module's path in a PeftModel
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class _FileModules(Mapping[str, LoraFactors]):
    """Factors read from a memory-mapped safetensors file when asked for, scaling folded in.

    The file is mapped anew for each module, so that pages once read do not stay resident.
    """

    def __init__(self, path: Path, scalings: dict[str, float]) -> None:
        self._path = path
        self._scalings = scalings

    def __getitem__(self, module: str) -> LoraFactors:
        scaling = self._scalings[module]
        with safe_open(self._path, framework="pt") as file:
            B = file.get_tensor(f"{MODULE_PREFIX}{module}.lora_B.weight")
            A = file.get_tensor(f"{MODULE_PREFIX}{module}.lora_A.weight")
        if scaling != 1:  # in fp32 at least: bf16 would round the product
            B = B.to(torch.promote_types(B.dtype, torch.float32)) * scaling
        return LoraFactors(B, A)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalings)

    def __len__(self) -> int:
        return len(self._scalings)


def locate_adapter(spec: str) -> Path:
    """Return the folder of an adapter: a local directory, or a hub id, fetched to the local cache.

    Raises
    ------
    AdapterError
        If it is neither a directory nor an id that can be reached.
    """
    path = Path(spec)
    if path.exists() or path.is_absolute() or spec.count("/") != 1 or spec.startswith("."):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(spec, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"adapter {spec!r} must be a directory or a Hugging Face id that can be reached: "
            f"{reason}"
        ) from error


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Open a PEFT LoRA directory; factors are memory-mapped and read module by module.

    Parameters
    ----------
    path : str or Path
        Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
    name : str, optional
        Name of the adapter; the directory's name by default.

    Returns
    -------
    Adapter

    Raises
    ------
    AdapterError
        If a file is missing or not safetensors, if the adapter is not a plain LoRA (DoRA, bias,
        saved modules and other forms are named), if it fits only a changed base (PiSSA, OLoRA,
        CorDA, LoRA-GA, LoftQ), or if a module lacks one of its factors.
    """
    path = Path(path)
    config = read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        found = "adapter_model.bin (a pickle)" if (path / "adapter_model.bin").exists() else "none"
        raise AdapterError(
            f"{path}: weights must be in {WEIGHTS_FILE}, found {found}; "
            "load it with PEFT and save it again with save_pretrained(safe_serialization=True)"
        )
    with safe_open(weights, framework="pt") as file:
        ranks = _module_ranks(path, {key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    scalings = {module: scaling_of(config, module, rank) for module, rank in ranks.items()}
    return Adapter(
        name=name or path.name,
        modules=_FileModules(weights, scalings),
        base_model=config.get("base_model_name_or_path"),
    )


def _module_ranks(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Pair lora_A with lora_B per module and return the ranks, sorted by module."""
    parts: dict[str, dict[str, Sequence[int]]] = {}
    for key, shape in shapes.items():
        suffix = next((s for s in _PARTS if key.endswith(s)), None)
        if suffix is None or not key.startswith(MODULE_PREFIX):
            raise AdapterError(f"{path}: unknown tensor {key!r}; only LoRA A and B can be merged")
        module = key.removeprefix(MODULE_PREFIX).removesuffix(suffix)
        parts.setdefault(module, {})[_PARTS[suffix]] = shape
    ranks = {}
    for module, pair in sorted(parts.items()):
        if pair.keys() != {"A", "B"}:
            raise AdapterError(
                f"{path}: module {module} has only lora_{''.join(pair)}; both needed"
            )
        if len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            raise AdapterError(
                f"{path}: module {module} must have A (r, d_in) and B (d_out, r), "
                f"got {list(pair['A'])} and {list(pair['B'])}; only linear layers can be merged"
            )
        ranks[module] = pair["A"][0]
    if not ranks:
        raise AdapterError(f"{path}: holds no LoRA tensors")
    return ranks


def write_adapter(adapter: Adapter, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a stock PEFT LoRA directory of scaling 1, atomically.

    Parameters
    ----------
    adapter : Adapter
        Every factor must be finite.
    path : str or Path
        Directory to create or replace; loads with ``PeftModel.from_pretrained``.
    dtype : torch.dtype
        Type of the stored factors; float32 keeps what bfloat16 would round away.

    Raises
    ------
    AdapterError
        If the adapter has no module or a factor is not finite.
    """
    if not adapter.modules:
        raise AdapterError(f"{adapter.name}: an adapter must have at least one module, got none")
    shapes, ranks = {}, {}
    for module in sorted(adapter.modules):
        B, A = adapter.modules[module]
        ranks[module] = A.shape[0]
        shapes[f"{MODULE_PREFIX}{module}.lora_A.weight"] = A.shape
        shapes[f"{MODULE_PREFIX}{module}.lora_B.weight"] = B.shape
    with atomic_path(Path(path)) as fresh:
        fresh.mkdir()
        with (fresh / WEIGHTS_FILE).open("wb") as file:
            file.write(_safetensors_header(shapes, dtype))
            for module in ranks:
                B, A = adapter.modules[module]
                if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
                    raise AdapterError(f"{adapter.name}: factors of {module} must be finite")
                for factor in (A, B):
                    file.write(factor.to(dtype).contiguous().view(torch.uint8).numpy().data)
        config = plain_config(adapter.base_model, ranks)
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _safetensors_header(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> bytes:
    """Return the start of a safetensors file whose tensors follow in the given order.

    Written here because the library's own writer needs all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        offsets = [start, end]
        header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
