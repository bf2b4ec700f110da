"""Every kernel against the plain form of what it computes: values and gradients."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tclora.model.kernels import attention
from tclora.model.kernels.attention import row_attention
from tclora.model.kernels.cross_entropy import linear_cross_entropy
from tclora.model.kernels.gate import silu_gate
from tclora.model.kernels.norm import rms_norm
from tclora.model.kernels.rotary import apply_rotary


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, grad=True):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    return normal


def assert_same(found, wanted, inputs, atol=1e-5):
    """Compare outputs, and the gradients of a random linear function of them."""
    found, wanted = ((x,) if torch.is_tensor(x) else x for x in (found, wanted))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator) for x in wanted]
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=atol)
    gradients = [torch.autograd.grad(x, inputs, upstream) for x in (found, wanted)]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=atol)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24)])
def test_rms_norm(draw, shape):
    x, norm = draw(*shape), LlamaRMSNorm(24, eps=1e-5)
    norm.weight.requires_grad_(False).copy_(draw(24, grad=False))
    assert_same(rms_norm(x, norm.weight, 1e-5), norm(x), x)


def test_silu_gate(draw):
    gate, up = draw(2, 3, 8), draw(2, 3, 8)
    assert_same(silu_gate(gate, up), nn.functional.silu(gate) * up, (gate, up))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary(draw, unsqueeze_dim):
    def shape(heads):
        return (2, heads, 5, 8) if unsqueeze_dim == 1 else (2, 5, heads, 8)

    q, k, angle = draw(*shape(4)), draw(*shape(2)), draw(2, 5, 4, grad=False).repeat(1, 1, 2)
    given = (q, k, angle.cos(), angle.sin(), unsqueeze_dim)
    assert_same(apply_rotary(*given), apply_rotary_pos_emb(*given[:4], unsqueeze_dim=unsqueeze_dim),
                (q, k))  # fmt: skip


@pytest.mark.parametrize("block", [2, 3, 128])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(7,), (1, 6, 3), (2, 2)])
def test_row_attention_is_causal_attention_of_every_row(draw, monkeypatch, block, kv, lengths):
    monkeypatch.setattr(attention, "BLOCK", block)
    N = sum(lengths)
    q, k, v = draw(4, N, 5), draw(kv, N, 5), draw(kv, N, 5)
    parts = [
        nn.functional.scaled_dot_product_attention(
            a[None], b[None], c[None], is_causal=True, scale=0.7, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b, c in zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    ]
    assert_same(row_attention(q, k, v, lengths, 0.7), torch.cat(parts), (q, k, v))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 64, 65])
def test_linear_cross_entropy(draw, count, with_bias):
    hidden, weight = draw(count, 6), draw(11, 6, grad=False)
    bias = draw(11, grad=False) if with_bias else None
    labels = torch.arange(count) % 11
    wanted = nn.functional.cross_entropy(
        nn.functional.linear(hidden, weight, bias), labels, reduction="none"
    )
    assert_same(linear_cross_entropy(hidden, weight, bias, labels), wanted, hidden)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, bias, labels), wanted, atol=1e-5)


def test_a_large_vocabulary_costs_no_precision(draw):
    hidden, weight = draw(3, 8, grad=False), draw(50_000, 8, grad=False)
    labels = torch.tensor([3, 40_000, 7])
    logits = (hidden.double() @ weight.double().mT).log_softmax(-1)
    wanted = -logits.gather(1, labels[:, None])[:, 0]
    found = linear_cross_entropy(hidden, weight, None, labels).double()
    assert torch.allclose(found, wanted, atol=5e-6)
