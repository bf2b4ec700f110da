import torch

from tclora.preflight.rates import measured_rates


def test_rates_are_measured_in_a_moment():
    rates = measured_rates(torch.float32, seconds=0.05)
    assert 1e9 < rates.products < 1e16
    assert 1e7 < rates.elements < 1e14
