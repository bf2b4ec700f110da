"""Causal attention within each of several rows that stand behind each other in one sequence.

No position is padding and none looks into another row. Scores are computed per row in blocks of
queries, and again in the backward pass, so that memory grows with the tokens and not with their
square. On a CPU with matrix units this is several times faster than torch's flash attention, whose
backward pass does not use them in bf16. On a GPU torch's flash attention reads such rows.

Shapes: N tokens of all rows, T of one, H heads, KV heads of keys and values, G = H / KV, D width of
a head; q (H, N, D); k, v (KV, N, D).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 128  # queries whose scores are held at once
_SOUND = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _causal_flash() -> Callable[..., Tensor] | None:
    """Return torch's flash attention for rows of unequal length, causal; None before torch 2.11."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    varlen_attn: Any = varlen.varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    shared = {"enable_gqa": True} if "enable_gqa" in known else {}  # of keys; where it must be said
    causal: Callable[..., Tensor] = partial(varlen_attn, window_size=(-1, 0), **shared)
    return causal


_FLASH = _causal_flash()


def row_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attend causally within rows.

    Parameters
    ----------
    q : Tensor
        (H, N, D).
    k, v : Tensor
        (KV, N, D); H is a multiple of KV.
    lengths : sequence of int
        Tokens of every row; N in all.
    scale : float
        Factor of the scores.

    Returns
    -------
    Tensor
        (N, H, D).
    """
    if _FLASH and has_flash(q.device, q.dtype):
        starts = _starts(tuple(lengths), q.device)
        rows = (part.transpose(0, 1) for part in (q, k, v))  # (N, H, D)
        longest = max(lengths)
        return _FLASH(*rows, starts, starts, longest, longest, scale=scale)
    attended: Tensor = _RowAttention.apply(q, k, v, lengths, scale)  # type: ignore[no-untyped-call]
    return attended


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's flash attention reads rows behind each other there."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and _FLASH is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def with_sound_gradients() -> AbstractContextManager[None]:
    """Return a context for padded rows whose gradients are wanted: it keeps cuDNN's attention out.

    On Hopper GPUs its backward pass returns NaN for some lengths where a mask is given
    (pytorch/pytorch#196678). Padded rows had such gradients with torch 2.11 on an H100.
    """
    context: AbstractContextManager[None] = sdpa_kernel(_SOUND)
    return context


@lru_cache(maxsize=8)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where every row starts and the last one ends, int32; the same for all layers."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        scale: float,
    ) -> Tensor:
        H, N, D = q.shape
        out = q.new_empty(N, H, D)
        for row, start, end in _blocks(lengths):
            queries = _grouped(q[:, start:end], len(k))
            shares = _shares(queries, k[:, row:end], end - start, scale)
            _scatter(out[start:end], torch.bmm(shares, v[:, row:end]))
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        q, k, v = ctx.saved_tensors
        dq = q.new_empty(q.shape[1], q.shape[0], q.shape[2])  # (N, H, D)
        dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
        for row, start, end in _blocks(ctx.lengths):
            queries = _grouped(q[:, start:end], len(k))
            upstream = _grouped(grads[0][start:end].transpose(0, 1), len(k))
            keys, values = k[:, row:end], v[:, row:end]
            shares = _shares(queries, keys, end - start, ctx.scale)
            dv[:, row:end] += torch.bmm(shares.mT, upstream)
            dshares = torch.bmm(upstream, values.mT)
            dscores = torch._softmax_backward_data(dshares, shares, -1, shares.dtype)
            dscores.mul_(ctx.scale)
            _scatter(dq[start:end], torch.bmm(dscores, keys))
            dk[:, row:end] += torch.bmm(dscores.mT, queries)
        return dq.transpose(0, 1), dk, dv, None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield blocks of queries: where their row starts, their first and last + 1 token."""
    row = 0
    for length in lengths:
        for start in range(row, row + length, BLOCK):
            yield row, start, min(start + BLOCK, row + length)
        row += length


def _grouped(x: Tensor, kv: int) -> Tensor:
    """Put heads that share keys behind each other: (H, t, D) to (KV, G t, D)."""
    return x.reshape(kv, -1, x.shape[-1])


def _scatter(target: Tensor, x: Tensor) -> None:
    """Write (KV, G t, D) to (t, H, D)."""
    t, _, D = target.shape
    target.copy_(x.view(-1, t, D).transpose(0, 1))


def _shares(queries: Tensor, keys: Tensor, t: int, scale: float) -> Tensor:
    """Return what share every query gives to each key up to its own, (KV, G t, keys)."""
    scores = torch.bmm(queries, keys.mT).mul_(scale)
    own = scores.view(len(keys), -1, t, keys.shape[1])[..., -t:]  # keys of the block itself
    own += _later(t, scores.dtype, scores.device)
    return torch.softmax(scores, -1)


@lru_cache(maxsize=64)
def _later(t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return -inf above the diagonal, 0 elsewhere."""
    return torch.full((t, t), -torch.inf, dtype=dtype, device=device).triu(1)
