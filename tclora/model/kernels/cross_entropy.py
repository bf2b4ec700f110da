"""Cross-entropy of a linear layer's outputs, without all of its logits at once.

The layer is frozen, so that the gradient with respect to its input can be formed right where the
logits are: a few rows of them at a time, overwritten by their gradient.

Shapes: S positions, d hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

_ROWS, _CUDA_ROWS = 64, 2048  # of logits at once: what a cache holds, what keeps a GPU busy


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T + bias`` at every position.

    Parameters
    ----------
    hidden : Tensor
        (S, d).
    weight : Tensor
        (V, d); gets no gradient, and neither does the bias.
    bias : Tensor or None
        (V,).
    labels : Tensor
        (S,) int64.

    Returns
    -------
    Tensor
        (S,) float32, nats.
    """
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _CUDA_ROWS if hidden.is_cuda else _ROWS
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            logs = torch.log_softmax(logits, -1, dtype=torch.float32)
            own = labels[part, None]
            losses[part] = -logs.gather(1, own)[:, 0]
            if dhidden is not None:
                shares = logs.exp_()
                shares.scatter_add_(1, own, shares.new_full(own.shape, -1.0))
                torch.mm(shares.to(weight.dtype), weight, out=dhidden[part])
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (dhidden,) = ctx.saved_tensors
        return dhidden * grads[0][:, None].to(dhidden.dtype), None, None, None
