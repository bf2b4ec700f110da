"""Rows behind each other against padded rows, for several architectures."""

import pytest
import torch
import transformers

from tclora.model.loss import chunked_nll, plain_head, supervised_nll
from tclora.model.reading import Packed, Padded, reading
from tclora.model.tokens import TokenRow

ROWS = [
    TokenRow(tuple(range(10, 10 + n)), tuple(range(40, 40 + m)))
    for n, m in ((5, 1), (3, 9), (8, 4))
]
LLAMA = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def make(name, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model.requires_grad_(False)


def losses_and_gradients(model, read, groups=None):
    """Return every row's loss and the gradient of its tokens' embeddings."""
    kept = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: kept.append((inputs[0], output.requires_grad_(True)))
    )
    losses, gradients = torch.zeros(len(ROWS)), {}
    with read.ready():
        for part in read.parts(ROWS, 30, groups):
            found = read.losses(part)
            found.sum().backward()
            losses[list(part.rows)] = found.detach()
    handle.remove()
    for ids, output in kept:  # every token stands in one row alone, or at one place of all
        for token in ids.unique().tolist():
            if token:
                own = output.grad[ids == token].sum(0)
                gradients[token] = gradients.get(token, 0) + own
    return losses, torch.stack([gradients[token] for token in sorted(gradients)])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", LLAMA),
        ("llama", LLAMA | {"attention_bias": True, "num_key_value_heads": 4}),
        ("mistral", LLAMA),
        ("qwen2", LLAMA),
        ("qwen3", LLAMA | {"head_dim": 8}),
        ("phi3", LLAMA),
        ("gemma", LLAMA | {"head_dim": 8}),
        ("mixtral", LLAMA),
        ("gpt2", GPT2 | NO_DROPOUT),
    ],
)
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(name, settings):
    model = make(name, **settings)
    read = reading(model, longest=64)
    assert isinstance(read, Packed)
    wanted, found = (losses_and_gradients(model, way) for way in (Padded(model), read))
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", LLAMA | {"head_dim": 8}),  # caps its scores
        ("granite", LLAMA | {"logits_scaling": 2.0}),
        ("gpt2", GPT2),  # drops scores in training
        ("mistral", LLAMA | {"sliding_window": 32}),
    ],
)
def test_what_packed_rows_would_change_is_padded(name, settings):
    model = make(name, **settings)
    assert isinstance(reading(model, longest=64), Padded)
    assert not model.training


@pytest.mark.parametrize(
    ("name", "settings", "plain"),
    [
        ("gpt2", GPT2, True),
        ("mistral", LLAMA | {"sliding_window": 32}, True),
        ("gemma2", LLAMA | {"head_dim": 8}, False),
        ("granite", LLAMA | {"logits_scaling": 2.0}, False),
    ],
)
def test_padded_rows_have_a_few_logits_at_once_where_these_are_plain(name, settings, plain):
    model = make(name, **settings)
    read = reading(model, longest=64)
    assert plain_head(model) is plain
    assert read._nll is (chunked_nll if plain else supervised_nll)
    wanted, found = (losses_and_gradients(model, way) for way in (Padded(model), read))
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_trained_output_layer_sees_whole_rows(tiny_model):
    assert isinstance(reading(tiny_model, 64, head_trained=True), Padded)


@pytest.mark.parametrize("way", [Padded, Packed])
@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_rows_of_a_group_stand_next_to_each_other(tiny_model, way, budget):
    groups = [1, 0, 1]
    parts = list(way(tiny_model).parts(ROWS, budget, groups))
    assert sorted(row for part in parts for row in part.rows) == [0, 1, 2]
    for part in parts:
        own = [groups[row] for row in part.rows]
        assert own == sorted(own)
        assert part.tokens == sum(len(ROWS[row]) for row in part.rows) <= part.positions
        assert part.positions <= budget or len(part.rows) == 1


def test_the_model_is_left_as_it_was(tiny_model):
    ids = torch.arange(4, 20)[None]
    before = tiny_model(ids).logits
    forwards = [module.forward for module in tiny_model.modules()]
    read = reading(tiny_model, 64)
    with read.ready():
        assert [module.forward for module in tiny_model.modules()] != forwards
    assert [module.forward for module in tiny_model.modules()] == forwards
    assert torch.equal(tiny_model(ids).logits, before)


def test_low_precision_stays_close():
    model = make("llama", **LLAMA).bfloat16()
    read = reading(model, 64)
    assert isinstance(read, Packed)
    wanted, found = (losses_and_gradients(model, way) for way in (Padded(model), read))
    assert torch.allclose(found[0], wanted[0], rtol=3e-2)
    error = (found[1] - wanted[1]).float().norm() / wanted[1].float().norm()
    assert error < 5e-2
