"""One module's K updates as a merge method sees them.

Symbols: K adapters, d_out × d_in the module, r_k the LoRA ranks, R the CP rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tclora.activations.metric import InputMetric
from tclora.adapter import LoraFactors
from tclora.tensor.compress import Core, compress
from tclora.tensor.library import CPFactors


@dataclass(frozen=True)
class ModuleStack:
    """K updates of one module.

    Attributes
    ----------
    module : str
        Module path.
    names : sequence of K str
        Adapter names.
    factors : sequence of K LoraFactors
        In double precision; an adapter without this module has rank zero.
    weights : Tensor, shape (K,)
        Relative weights of the adapters, with sum 1.
    joint : callable
        Returns the joint CP factors of the module, rows of C in the order of `factors`.
    inputs : callable or None
        Returns the metric of the module's inputs, where there are activation statistics.
    rank : int or None
        Rank R asked for; the engine truncates to it whatever the method does with it.
    seed : int
        Seed of anything random; different for every module.
    """

    module: str
    names: Sequence[str]
    factors: Sequence[LoraFactors]
    weights: Tensor
    joint: Callable[[], CPFactors]
    inputs: Callable[[], InputMetric] | None = None
    rank: int | None = None
    seed: int = 0

    @property
    def Bs(self) -> list[Tensor]:  # noqa: N802
        """Output factors, shapes (d_out, r_k)."""
        return [factors.B for factors in self.factors]

    @property
    def As(self) -> list[Tensor]:  # noqa: N802
        """Input factors, shapes (r_k, d_in)."""
        return [factors.A for factors in self.factors]

    @property
    def total_rank(self) -> int:
        """Σ r_k, at most the smaller side of the module."""
        return min(sum(f.rank for f in self.factors), *self.factors[0].shape)

    @cached_property
    def metric(self) -> InputMetric:
        """The metric of the module's inputs.

        Raises
        ------
        ValueError
            If the module has no activation statistics.
        """
        if self.inputs is None:
            raise ValueError(f"{self.module}: activation statistics are missing; pass statistics=…")
        return self.inputs()

    @cached_property
    def core(self) -> Core:
        """The updates compressed to shared orthonormal bases."""
        return compress(self.Bs, self.As)

    def generator(self) -> torch.Generator:
        """Return a fresh random generator of this module."""
        return torch.Generator().manual_seed(self.seed)

    def concatenated(self, scales: Tensor) -> LoraFactors:
        """Return Σ_k scales[k] Δ_k exactly: the factors side by side, rank Σ r_k."""
        return LoraFactors(
            torch.cat([B * s for B, s in zip(self.Bs, scales, strict=True)], dim=1),
            torch.cat(self.As),
        )
