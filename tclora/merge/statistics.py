"""Activation statistics: the Gram matrices of module inputs, per cluster.

Symbols: K clusters, d_in the width of a module's input, G_k = Σ_t x_t x_tᵀ over the tokens t of
cluster k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tclora.errors import AdapterError


@dataclass(frozen=True)
class ActivationStatistics:
    """Gram matrices of module inputs per cluster; modules that share an input share the matrix.

    Attributes
    ----------
    names : tuple of str
        Clusters, in the order of the first axis of every matrix.
    groups : Mapping[str, str]
        Module path → name of the group of modules that read the same input.
    grams : Mapping[str, Tensor]
        Group → Gram matrices, shape (K, d_in, d_in), a dict or a lazy view on a file.
    tokens : tuple of int
        Tokens seen per cluster.
    """

    names: tuple[str, ...]
    groups: Mapping[str, str]
    grams: Mapping[str, Tensor]
    tokens: tuple[int, ...]

    def of(self, module: str, names: Sequence[str]) -> Tensor:
        """Return a module's Gram matrices for the named clusters, shape (K, d_in, d_in), float64.

        Raises
        ------
        AdapterError
            If a cluster or the module was not seen.
        """
        missing = [name for name in names if name not in self.names]
        if missing or module not in self.groups:
            what = f"module {module}" if not missing else f"clusters {', '.join(missing)}"
            raise AdapterError(
                f"activation statistics must cover {what}, got clusters {', '.join(self.names)} "
                f"and {len(self.groups)} modules; collect them again"
            )
        grams = self.grams[self.groups[module]]
        return grams[[self.names.index(name) for name in names]].to(torch.float64)
