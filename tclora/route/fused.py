"""The forward pass of a gated LoRA layer in three products, without PEFT's intermediate tensors.

PEFT computes base(x) + s · B(gate(A x)) with a pass over the whole output for the scaling and one
for the sum. Where no gradient is asked for, the update is added to the base layer's output by the
last product itself, which makes a gated layer cheaper than PEFT's plain one.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

Gate = Callable[[Tensor], Tensor]  # components (n, T, R) → gated components (n, T, R)


def fuse(layer: Linear, adapter: str, current: Callable[[], Gate]) -> None:
    """Let a layer's forward pass take the short way wherever it gives the same result.

    Parameters
    ----------
    layer : peft.tuners.lora.Linear
        PEFT's layer; its `forward` is replaced. In training, under autocast, with other adapters,
        disabled or quantised, PEFT's own forward pass runs.
    adapter : str
        PEFT's name of the gated adapter.
    current : callable
        Returns the gate in force.
    """
    plain = layer.forward
    base = layer.base_layer

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        A, B = (cast("Tensor", part[adapter].weight) for part in (layer.lora_A, layer.lora_B))
        if (
            args
            or kwargs
            or not isinstance(base, nn.Linear)
            or not x.dtype == base.weight.dtype == A.dtype
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or layer.training
            or layer.disable_adapters
            or layer.active_adapters != [adapter]
            or layer.lora_bias[adapter]
            or adapter in layer.lora_variant
        ):
            return plain(x, *args, **kwargs)
        output: Tensor = base(x)
        components = current()(linear(x, A))
        output.view(-1, output.shape[-1]).addmm_(
            components.reshape(-1, components.shape[-1]), B.mT, alpha=layer.scaling[adapter]
        )
        return output

    layer.forward = forward  # type: ignore[method-assign]
