"""The response NLL of a few rows of every cluster under one adapter after the other."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tclora.adapter import Adapter
from tclora.model.attach import attached
from tclora.model.reading import head_among, reading
from tclora.model.tokens import TokenRow

TOKEN_BUDGET = 2048


class ClusterLoss:
    """Measures adapters by the loss on sample rows, every cluster by itself.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    rows : Mapping[str, sequence of TokenRow]
        Cluster → its rows, at least one.
    modules : iterable of str
        Paths of the modules that the adapters change.
    token_budget : int
        Positions per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Mapping[str, Sequence[TokenRow]],
        modules: Iterable[str],
        *,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        longest = max(len(row) for part in rows.values() for row in part)
        self._model = model
        self._read = reading(model, longest, head_trained=head_among(model, modules))
        self._parts = {
            name: list(self._read.parts(part, token_budget)) for name, part in rows.items()
        }
        self._tokens = {name: sum(len(row.response) for row in part) for name, part in rows.items()}

    @torch.no_grad()
    def of(
        self, cluster: str, adapter: Adapter | None, gates: Mapping[str, Tensor] | None = None
    ) -> float:
        """Return the response NLL per token of one cluster's rows (nats).

        Parameters
        ----------
        cluster : str
            Whose rows.
        adapter, gates
            See `tclora.model.attach.attached`.
        """
        with self._read.ready(), attached(self._model, adapter, gates):
            total = sum(float(self._read.losses(part).sum()) for part in self._parts[cluster])
        return total / self._tokens[cluster]

    def mean(self, adapter: Adapter | None) -> float:
        """Return the mean over the clusters; every cluster counts the same."""
        return sum(self.of(cluster, adapter) for cluster in self._parts) / len(self._parts)
