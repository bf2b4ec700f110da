import pytest
import torch

from tclora.model.packing import pack, packs
from tclora.model.tokens import TokenRow

ROWS = [TokenRow((1, 2, 3), (4, 5)), TokenRow((6,), (7,)), TokenRow((8, 9), (10, 11, 12))]


def test_rows_stand_behind_each_other():
    found = pack(ROWS, (2, 0))
    assert found.input_ids.tolist() == [[8, 9, 10, 11, 12, 1, 2, 3, 4, 5]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert found.lengths == (5, 5)
    assert found.rows == (2, 0)
    assert found.tokens == 10


def test_every_response_token_is_predicted_once():
    found = pack(ROWS, (0, 1, 2))
    assert found.labels.tolist() == [4, 5, 7, 10, 11, 12]
    following = found.input_ids[0, found.places + 1]
    assert torch.equal(following, found.labels)
    assert found.owners.tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(100, [(0, 2, 1)]), (10, [(0, 2), (1,)]), (7, [(0,), (2, 1)]), (1, [(0,), (2,), (1,)])],
)
def test_packs_are_filled_up_to_the_budget(budget, wanted):
    assert [found.rows for found in packs(ROWS, token_budget=budget)] == wanted


def test_packs_keep_the_order_given():
    found = packs(ROWS, token_budget=7, order=(1, 0, 2))
    assert [one.rows for one in found] == [(1, 0), (2,)]
