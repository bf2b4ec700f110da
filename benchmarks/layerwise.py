"""Merging layer by layer, each layer on the activations of what has been merged below it.

Merges that use statistics regard each module apart, on the inputs it has in the base model; in the
merged model it reads what the layers below have made of them. RegMean++ is `regmean` merged so.

Symbols: K adapters, L layers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from tclora.activations.collect import ActivationStatistics, collect
from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import check_adapters, module_names
from tclora.merge.engine import merge
from tclora.model.attach import attached
from tclora.model.tokens import TokenRow

_LAYER = re.compile(r"^(.*?\.\d+)\.")  # up to the first number of a module's path


def merge_by_layers(
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    rows: Mapping[str, Sequence[TokenRow]],
    method: str = "regmean",
    *,
    pad_id: int,
    **settings: Any,  # noqa: ANN401
) -> Adapter:
    """Merge adapters from the first layer to the last.

    The statistics of a layer are those of cluster k's rows in the merged model up to that layer,
    and with adapter k's own update in it.

    Parameters
    ----------
    model, adapters
        See `tclora.tune.scale.tune_scale`.
    rows : Mapping[str, sequence of TokenRow]
        Adapter name → a few rows of its cluster.
    method : str
        A method that uses statistics.
    pad_id : int
        Padding token.
    **settings
        Further arguments of `merge`, such as rank.

    Returns
    -------
    Adapter

    Notes
    -----
    K L forward passes over each cluster's rows, statistics of one layer in memory at a time.

    References
    ----------
    Nguyen et al. (2025), "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean
    for Model Merging", arXiv 2508.03121.
    """
    check_adapters(adapters)
    below: dict[str, LoraFactors] = {}
    for modules in _layers(model, module_names(adapters)):
        parts = [_part(adapter, modules) for adapter in adapters]
        seen = [_statistics(model, below, part, rows[part.name], modules, pad_id) for part in parts]
        statistics = ActivationStatistics(
            seen[0].groups,
            {name: grams for one in seen for name, grams in one.grams.items()},
            {name: tokens for one in seen for name, tokens in one.tokens.items()},
        )
        below |= merge(parts, method, statistics=statistics, **settings).adapter.modules
    return Adapter(f"{method}-by-layers", dict(sorted(below.items())), adapters[0].base_model)


def _statistics(
    model: PreTrainedModel,
    below: Mapping[str, LoraFactors],
    part: Adapter,
    rows: Sequence[TokenRow],
    modules: Sequence[str],
    pad_id: int,
) -> ActivationStatistics:
    """Collect the statistics of one layer's modules on one cluster."""
    active = Adapter(part.name, {**below, **part.modules}, part.base_model)
    with attached(model, active):
        return collect(model, rows, part.name, modules, pad_id=pad_id)


def _part(adapter: Adapter, modules: Sequence[str]) -> Adapter:
    """Return the adapter's updates of some modules."""
    own = {m: adapter.modules[m] for m in modules if m in adapter.modules}
    return Adapter(adapter.name, own, adapter.base_model)


def _layers(model: PreTrainedModel, modules: Sequence[str]) -> list[list[str]]:
    """Group modules by layer, in the model's own order; one outside of any layer is by itself."""
    wanted = set(modules)
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if name in wanted:
            found = _LAYER.match(name)
            layers.setdefault(found[1] if found else name, []).append(name)
    return list(layers.values())
