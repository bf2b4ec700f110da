"""Rotary position embeddings without copies of rotated halves.

Shapes: x (n, H, T, D), in memory usually (n, T, H, D); cos, sin (n, T, D), their halves alike.
"""

from typing import Any

import torch
from torch import Tensor


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, as transformers' ``apply_rotary_pos_emb``.

    Parameters
    ----------
    q, k : Tensor
        (n, H, T, D), or (n, T, H, D) with `unsqueeze_dim` 2.
    cos, sin : Tensor
        (n, T, D); get no gradient.
    unsqueeze_dim : int
        Where the dimension of heads is.

    Returns
    -------
    tuple of Tensor
        Of the shapes of q and k.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin; backwards the angle is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    (x1, x2), (s1, s2) = x.chunk(2, -1), sin.chunk(2, -1)
    turned = x * cos
    first, second = turned.chunk(2, -1)
    first.addcmul_(x2, s1, value=-sign)
    second.addcmul_(x1, s2, value=sign)
    return turned
