import threading

import pytest
import torch

from tclora.tensor.sidebyside import side_by_side


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_results_come_in_order_from_threads_of_one_core_each():
    late = threading.Event()

    def work(item):
        if item == 0:
            assert late.wait(30)
        if item == 2:
            late.set()
        return item, torch.get_num_threads()

    assert list(side_by_side(work, range(9))) == [(item, 1) for item in range(9)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_few_items_are_taken_ahead():
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = side_by_side(float, items())
    assert next(results) == 0
    assert len(taken) <= 4
    results.close()
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_is_raised_where_results_are_taken():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 // item, [1, 0, 1]))
    assert torch.get_num_threads() == 3
