"""Kernels and readings on a GPU against plain computations."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.model.kernels.attention import has_flash, row_attention
from tclora.model.kernels.cross_entropy import linear_cross_entropy
from tclora.model.kernels.norm import rms_norm
from tclora.model.reading import Packed, Padded, reading
from tclora.model.tokens import TokenRow

LENGTHS = (5, 130, 1, 64)
KINDS = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]


def relative(found, wanted):
    found, wanted = found.float().cpu(), wanted.float().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def with_gradients(function, *given):
    """Return the values and the gradients of a random projection of them."""
    given = [part.detach().clone().requires_grad_(True) for part in given]
    out = function(*given)
    draw = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=draw).to(out.device, out.dtype)
    out.backward(upstream)
    return [out.detach(), *(part.grad for part in given)]


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=str)
@pytest.mark.parametrize("kv", [8, 2])
def test_rows_attend_to_themselves(dtype, tolerance, kv):
    draw = torch.Generator().manual_seed(0)
    N = sum(LENGTHS)
    q, k, v = (torch.randn(heads, N, 16, generator=draw) for heads in (8, kv, kv))

    def plain(q, k, v):
        parts = zip(*(part.split(LENGTHS, 1) for part in (q, k, v)), strict=True)
        attended = [
            nn.functional.scaled_dot_product_attention(
                a[None], b[None], c[None], is_causal=True, enable_gqa=True
            )[0]
            for a, b, c in parts
        ]
        return torch.cat(attended, 1).transpose(0, 1)

    def rows(q, k, v):
        return row_attention(q, k, v, LENGTHS, 16**-0.5)

    wanted = with_gradients(plain, q, k, v)
    found = with_gradients(rows, *(part.to("cuda", dtype) for part in (q, k, v)))
    for one, two in zip(found, wanted, strict=True):
        assert relative(one, two) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=str)
def test_norm_and_cross_entropy(dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 32, generator=draw), torch.rand(32, generator=draw)
    head = torch.randn(300, 32, generator=draw)
    labels = torch.randint(300, (70,), generator=draw)
    for function in (
        lambda x: rms_norm(x, weight.to(x.device, x.dtype), 1e-5),
        lambda x: linear_cross_entropy(x, head.to(x.device, x.dtype), None, labels.to(x.device)),
    ):
        wanted = with_gradients(function, x)
        found = with_gradients(function, x.to("cuda", dtype))
        for one, two in zip(found, wanted, strict=True):
            assert relative(one, two) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_packed_where_flash_attention_reads_them(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    rows = [
        TokenRow(tuple(range(10, 10 + n)), tuple(range(40, 40 + m)))
        for n, m in ((5, 1), (3, 9), (8, 4))
    ]

    def losses(model, read):
        found = torch.zeros(len(rows))
        with read.ready(), torch.no_grad():
            for part in read.parts(rows, 100):
                found[list(part.rows)] = read.losses(part).float().cpu()
        return found

    wanted = losses(model, Padded(model))
    model.to("cuda", dtype)
    read = reading(model, 64)
    assert isinstance(read, Packed if has_flash(model.device, dtype) else Padded)
    assert relative(losses(model, read), wanted) <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("length", [64, 192, 320, 300])
def test_padded_rows_have_finite_gradients(length):
    """Not with cuDNN's attention: see `with_sound_gradients`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=256, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    rows = [TokenRow((5,) * (size - 4), (6, 7, 8, 9)) for size in (length, 20, length // 2)]
    read = Padded(model)
    with read.ready():
        for part in read.parts(rows, 10_000):
            read.losses(part).sum().backward()
    for weight in model.parameters():
        assert weight.grad is None or weight.grad.isfinite().all()
