"""LoRA adapters in memory: per module, the two factors of its low-rank update.

Symbols: d_out × d_in the module's weight, r its LoRA rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LoraFactors(NamedTuple):
    """One module's low-rank update Δ = B @ A, its scaling folded into B."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)

    @property
    def rank(self) -> int:
        """The LoRA rank r."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape (d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """Return the dense update, shape (d_out, d_in): for tests and small shapes only."""
        return self.B @ self.A


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module path in the base model → factors, in sorted order.

    Attributes
    ----------
    name : str
        What tables and errors call it.
    modules : Mapping[str, LoraFactors]
        A dict, or a lazy view on a safetensors file that reads one module at a time.
    base_model : str or None
        Id or path of the base model the adapter belongs to, as PEFT records it.
    """

    name: str
    modules: Mapping[str, LoraFactors]
    base_model: str | None = None
