"""The metric of a module's inputs: Gram matrices made ready for inversion.

Symbols: K clusters, d_in the width of the module's input, G_k (d_in, d_in) the mean of
x xᵀ over cluster k, M = Σ_k G_k.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tclora.activations.collect import ActivationStatistics

# Off-diagonal elements are multiplied by this, as RegMean's authors do (arXiv 2212.09849).
_OFF_DIAGONAL = 0.9
# Least diagonal element, relative to the mean one: inputs that were never active.
_FLOOR = 1e-6
# Modules that read the same input share its metric, as long as all that is kept is below (bytes).
_KEPT = 1 << 29


class InputMetric:
    """Positive definite Gram matrices of one input, weighted by the adapters, and their sum.

    Parameters
    ----------
    grams : Tensor, shape (K, d_in, d_in)
        The clusters' mean of x xᵀ; changed in place.
    weights : Tensor, shape (K,)
        Relative weights of the adapters.
    off_diagonal : float
        Elements beside the diagonal are multiplied by this.
    """

    def __init__(self, grams: Tensor, weights: Tensor, off_diagonal: float = _OFF_DIAGONAL) -> None:
        diagonal = grams.diagonal(dim1=1, dim2=2).clone()
        floor = _FLOOR * diagonal.mean().clamp_min(torch.finfo(grams.dtype).tiny)
        weights = weights.to(grams)
        grams *= off_diagonal * weights[:, None, None]
        grams.diagonal(dim1=1, dim2=2).copy_(diagonal.clamp_min(floor) * weights[:, None])
        self.grams = grams

    @cached_property
    def root(self) -> Tensor:
        """Lower triangular root of the whole metric, M = root rootᵀ, shape (d_in, d_in)."""
        root: Tensor = torch.linalg.cholesky(self.grams.sum(0))
        return root


class InputMetrics:
    """The metrics of all modules' inputs, each prepared once while memory allows."""

    def __init__(
        self, statistics: ActivationStatistics, names: Sequence[str], weights: Tensor
    ) -> None:
        self._statistics = statistics
        self._names = names
        self._weights = weights
        self._kept: dict[str, InputMetric] = {}

    def of(self, module: str) -> InputMetric:
        """Return the metric of one module's inputs."""
        group = self._statistics.groups.get(module, module)
        found = self._kept.pop(group, None)
        if found is None:
            found = InputMetric(self._statistics.of(module, self._names), self._weights)
        self._kept[group] = found  # the most recent one last
        while sum(metric.grams.nbytes for metric in self._kept.values()) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return found
