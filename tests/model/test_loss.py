import pytest
import torch

from tclora.model.loss import response_nll, supervised_nll
from tclora.model.tokens import TokenRow, batches

ROWS = [
    TokenRow(tuple(range(10, 10 + n)), tuple(range(40, 40 + m)))
    for n, m in ((5, 1), (3, 9), (8, 4))
]


@pytest.mark.parametrize("budget", [1, 1000])
def test_logits_at_supervised_positions_alone_give_the_same(tiny_model, budget):
    for batch in batches(ROWS, pad_id=0, token_budget=budget):
        wanted, found = (f(tiny_model, batch) for f in (response_nll, supervised_nll))
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)
        assert (found != 0).sum() == batch.supervised


def test_the_model_is_left_as_it_was(tiny_model):
    (batch,) = batches(ROWS, pad_id=0)
    before = response_nll(tiny_model, batch)
    supervised_nll(tiny_model, batch)
    assert torch.equal(response_nll(tiny_model, batch), before)
