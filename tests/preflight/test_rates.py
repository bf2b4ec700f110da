import itertools
import time

import torch

from tclora.preflight.rates import _per_second, measured_rates


def test_rates_are_measured_in_a_moment():
    rates = measured_rates(torch.float32, seconds=0.05)
    assert 1e9 < rates.products < 1e16
    assert 1e7 < rates.elements < 1e14


def test_a_few_calls_that_wait_do_not_count():
    """As beside another process, where a thread waits for one whose core is taken."""
    numbers = itertools.count()

    def compute():
        time.sleep(0.1 if next(numbers) % 3 == 0 else 0.001)
        return torch.zeros(1)

    assert _per_second(compute, 1.0) > 60  # the mean is below 30
