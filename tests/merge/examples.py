"""Small adapters and statistics, and how to compare updates."""

import torch

from tclora.activations import ActivationStatistics
from tclora.adapter import Adapter, LoraFactors

D_OUT, D_IN = 20, 16
MODULES = {"layers.0.q": (D_OUT, D_IN), "layers.0.up": (30, D_IN), "layers.1.q": (D_OUT, D_IN)}
NAMES = ("algebra", "law", "prose")


def make_adapter(name, rank=3, modules=MODULES, seed=0, base_model="base"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {m: LoraFactors(draw(o, rank), draw(rank, i)) for m, (o, i) in modules.items()}
    return Adapter(name, factors, base_model)


def make_statistics(names=NAMES, modules=MODULES):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(names), 40, D_IN, generator=generator, dtype=torch.float64)
    x = x * torch.rand(len(names), 1, D_IN, generator=generator, dtype=torch.float64)
    return ActivationStatistics(
        groups=dict.fromkeys(modules, "inputs"),
        grams={name: {"inputs": own.mT @ own / 40} for name, own in zip(names, x, strict=True)},
        tokens=dict.fromkeys(names, 40),
    )


def deltas(adapter):
    return {module: factors.delta() for module, factors in adapter.modules.items()}


def assert_same_updates(one, other, tolerance=1e-6):
    assert one.modules.keys() == other.modules.keys()
    for module, delta in deltas(one).items():
        expected = other.modules[module].delta()
        error = (delta - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, (module, float(error))
