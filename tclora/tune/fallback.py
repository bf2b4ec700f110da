"""The gate of rows that belong to no cluster, chosen by the base model's loss.

What such rows are is not known; rows of a cluster that the gate knows nothing of come nearest. For
cluster k's sample rows the gate is made of the other clusters alone (leave one cluster out), so
that neither its adapter nor its inputs can help.

Scales end at 1. Leaving a cluster out also takes away its part in what all updates share, so that
larger scales look good on its rows (2 on the demo, where they do harm on rows of other tasks).

Symbols: K clusters, t the spread and λ the scale of a fallback rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from tclora.adapter import Adapter, LoraFactors
from tclora.model.cluster_loss import TOKEN_BUDGET, ClusterLoss
from tclora.model.tokens import TokenRow
from tclora.route.equations import Fallback
from tclora.route.gates import GatedAdapter, GateFit

SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.4, 0.5, 0.64, 0.8, 1.0)

Progress = Callable[[Fallback, float], None]


@dataclass(frozen=True)
class FallbackSearch:
    """The outcome of a search.

    Attributes
    ----------
    rule : Fallback
        The rule of lowest loss.
    losses : tuple of (Fallback, float)
        Every rule tried and its loss: the mean over the clusters of the response NLL (nats per
        token) on their rows, by the gate of the other clusters.
    """

    rule: Fallback
    losses: tuple[tuple[Fallback, float], ...]


def choose_fallback(
    model: PreTrainedModel,
    fit: GateFit,
    rows: Mapping[str, Sequence[TokenRow]],
    *,
    token_budget: int = TOKEN_BUDGET,
    spreads: Sequence[float] = SPREADS,
    scales: Sequence[float] = SCALES,
    progress: Progress = lambda _rule, _loss: None,
) -> FallbackSearch:
    """Choose how the fallback gate is made: the spread at scale 1 first, then the scale.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    fit : GateFit
        The equations of the gates; of two clusters or more.
    rows : Mapping[str, sequence of TokenRow]
        Adapter name → rows of its cluster.
    token_budget : int
        Positions per forward pass.
    spreads, scales : sequence of float
        The candidates; small scales tend to the base model.
    progress : callable, optional
        Called with (rule, loss) after each.

    Returns
    -------
    FallbackSearch

    Raises
    ------
    ValueError
        If there is only one cluster: none can be left out.
    """
    if len(fit.unit.names) < 2:
        raise ValueError("fit must be of two clusters or more, got one; take the default rule")
    components = unit_adapter(fit.unit)
    losses = ClusterLoss(model, rows, components.modules, token_budget=token_budget)
    tried: dict[Fallback, float] = {}

    def loss(rule: Fallback) -> float:
        if rule not in tried:
            found = [
                losses.of(name, components, fit.fallback(rule, without=k))
                for k, name in enumerate(fit.unit.names)
            ]
            tried[rule] = sum(found) / len(found)
            progress(rule, tried[rule])
        return tried[rule]

    best = min((Fallback(spread) for spread in spreads), key=loss)
    best = min((replace(best, scale=scale) for scale in scales), key=loss)
    return FallbackSearch(best, tuple(tried.items()))


def unit_adapter(gated: GatedAdapter) -> Adapter:
    """Return the unit components U V of a gated adapter, to be attached with gates, float32."""
    merged = gated.adapter
    modules = {m: LoraFactors(*(f.float() for f in gated.components(m))) for m in merged.modules}
    return Adapter(merged.name, modules, merged.base_model)
