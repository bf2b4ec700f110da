"""The gate of a SwiGLU layer, with what its backward pass needs computed in place."""

from typing import Any

import torch
from torch import Tensor, nn


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, elementwise.

    Parameters
    ----------
    gate, up : Tensor
        Equal in shape and dtype.
    """
    gated: Tensor = _SiluGate.apply(gate, up)  # type: ignore[no-untyped-call]
    return gated


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        gate, up = ctx.saved_tensors
        d_up = nn.functional.silu(gate).mul_(grads[0])
        d_gate = up * grads[0]
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up
