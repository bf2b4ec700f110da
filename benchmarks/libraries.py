"""Synthetic adapter libraries for the benchmarks.

Factors imitate trained adapters: a common initial A, decaying directions, some of each update
shared by all adapters.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from tclora.adapter import Adapter, LoraFactors, write_adapter

# Module shapes (d_out, d_in) of one layer.
MISTRAL_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SMOLLM2_135M = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def layers(shapes: Mapping[str, tuple[int, int]], count: int) -> dict[str, tuple[int, int]]:
    """Return the module shapes of `count` equal layers."""
    return {
        f"model.layers.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()
    }


def draw_adapter(
    name: str, shapes: Mapping[str, tuple[int, int]], r: int, seed: int, dtype: torch.dtype
) -> Adapter:
    """Draw one adapter; adapters drawn with different seeds share part of every update."""
    own = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(12345)
    decay = torch.exp(-torch.arange(r) / 5)
    modules = {}
    for module, (d_out, d_in) in shapes.items():
        A = torch.randn(r, d_in, generator=common) + 0.5 * torch.randn(r, d_in, generator=own)
        B = 0.7 * torch.randn(d_out, r, generator=common) + torch.randn(d_out, r, generator=own)
        modules[module] = LoraFactors((B * decay).to(dtype), A.to(dtype))
    return Adapter(name, modules, "base")


def draw_library(
    shapes: Mapping[str, tuple[int, int]],
    K: int,
    r: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Adapter]:
    """Draw K adapters."""
    return [draw_adapter(f"a{k}", shapes, r, 1000 * seed + k, dtype) for k in range(K)]


def write_library(
    folder: Path, shapes: Mapping[str, tuple[int, int]], K: int, r: int = 16
) -> list[Path]:
    """Write K bf16 PEFT adapters, one at a time, unless they are there; return their folders."""
    paths = [folder / f"a{k}" for k in range(K)]
    for k, path in enumerate(paths):
        if not path.exists():
            adapter = draw_adapter(path.name, shapes, r, k, torch.bfloat16)
            write_adapter(adapter, path, torch.bfloat16)
    return paths
