import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.model.loss import chunked_nll, response_nll, supervised_nll
from tclora.model.tokens import TokenRow, batches

ROWS = [
    TokenRow(tuple(range(10, 10 + n)), tuple(range(40, 40 + m)))
    for n, m in ((5, 1), (3, 9), (8, 4))
]


@pytest.mark.parametrize("way", [supervised_nll, chunked_nll])
@pytest.mark.parametrize("budget", [1, 1000])
def test_logits_at_supervised_positions_alone_give_the_same(tiny_model, budget, way):
    for batch in batches(ROWS, pad_id=0, token_budget=budget):
        wanted, found = (f(tiny_model, batch) for f in (response_nll, way))
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)
        assert (found != 0).sum() == batch.supervised


def test_the_model_is_left_as_it_was(tiny_model):
    (batch,) = batches(ROWS, pad_id=0)
    before = response_nll(tiny_model, batch)
    supervised_nll(tiny_model, batch)
    assert torch.equal(response_nll(tiny_model, batch), before)


def test_a_large_vocabulary_makes_no_difference_between_them():
    """Torch's kernels for classes first and classes last differ by 7e-5 there."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=50_000, hidden_size=16, initializer_range=0.7, **shape)
    model = LlamaForCausalLM(config).eval()
    (batch,) = batches(ROWS, pad_id=0)
    with torch.no_grad():
        wanted, found = (f(model, batch) for f in (response_nll, supervised_nll))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
