"""How fast this process's device multiplies matrices and passes over arrays."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from tclora.model.locate import default_device

_PRODUCTS_PER_ELEMENT = 70.0  # of rates measured on two CPUs; see docs/LOG.md


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Attributes
    ----------
    products : float
        Operations per second of matrix products.
    elements : float
        Elements per second of an elementwise product of two arrays.
    """

    products: float
    elements: float

    @classmethod
    def given(cls, products: float) -> "Rates":
        """Return the rates of a device of which only that of products is known."""
        return cls(products, products / _PRODUCTS_PER_ELEMENT)

    def part(self, share: float) -> "Rates":
        """Return what a process has of the device; it calls operators as fast as alone."""
        return Rates(self.products * share, self.elements * share)


def measured_rates(dtype: torch.dtype, seconds: float = 0.5) -> Rates:
    """Measure this process's device, so many seconds per rate."""
    device = default_device()
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Rates(
        2 * size**3 * _per_second(lambda: a @ b, seconds),
        size**2 * _per_second(lambda: a * b, seconds),
    )


def _per_second(compute: Callable[[], torch.Tensor], seconds: float) -> float:
    """Return the rate of the median call: beside other processes some wait long for a thread."""

    def duration() -> float:
        begin = time.perf_counter()
        if compute().is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    duration()  # the first prepares
    end, durations = time.perf_counter() + seconds, [duration()]
    while time.perf_counter() < end:
        durations.append(duration())
    return 1 / median(durations)
