"""The scale λ of a merge chosen by the base model's loss on sample rows.

Methods that add updates up (task arithmetic, TIES, TSV-M and others) depend on λ more than on
anything else, so that they can be compared at a scale chosen in the same way for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tclora.adapter import Adapter
from tclora.files import write_json
from tclora.jobs.call import EventCallback
from tclora.merge.engine import merge
from tclora.merge.inputs import MergeInputs
from tclora.merge.registry import get
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.model.loss import response_nll
from tclora.model.sample import Sample
from tclora.model.tokens import Batch

GRID = (0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class ScaleSearch:
    """The outcome of a search.

    Attributes
    ----------
    scale : float
        The scale with the lowest loss.
    losses : Mapping[float, float]
        Scale → mean response NLL (nats per token) on the sample rows.
    """

    scale: float
    losses: Mapping[float, float]


def is_scaled(method: str) -> bool:
    """Whether a method has a scale."""
    return "scale" in get(method).info.options


@torch.no_grad()
def tune_scale(
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    method: str,
    batches: Sequence[Batch],
    scales: Sequence[float] = GRID,
    *,
    progress: Callable[[float, float], None] | None = None,
    **settings: Any,  # noqa: ANN401
) -> ScaleSearch:
    """Choose the scale of a merge from a grid.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    adapters : sequence of K Adapter
        What is merged.
    method : str
        A method with a scale.
    batches : sequence of Batch
        Sample rows of all clusters, in equal shares.
    scales : sequence of float
        The grid.
    progress : callable, optional
        Called with (scale, loss) after each.
    **settings
        Further arguments of `merge`, such as rank.

    Returns
    -------
    ScaleSearch

    Raises
    ------
    ValueError
        If the method has no scale, or the grid is empty or not positive.
    """
    if not is_scaled(method):
        raise ValueError(f"method must have a scale to tune, {method} has none")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive and at least one, got {list(scales)}")
    tokens = sum(batch.supervised for batch in batches)
    losses: dict[float, float] = {}
    for scale in scales:
        merged = merge(adapters, method, **settings, scale=scale).adapter
        with attached(model, merged):
            total = sum(float(response_nll(model, batch).sum()) for batch in batches)
        losses[scale] = total / tokens
        if progress:
            progress(scale, losses[scale])
    return ScaleSearch(min(losses, key=losses.__getitem__), losses)


def choose_scale(
    *,
    name: str,
    base: Base,
    sample: Sample,
    given: MergeInputs,
    scales: list[float],
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> ScaleSearch:
    """Choose the scale of one method on rows of every cluster; the job of a run.

    Parameters
    ----------
    name : str
        The merge method.
    base : Base
        The base model.
    sample : Sample
        The rows.
    given : MergeInputs
        What is merged.
    scales : list of float
        The grid.
    target : Path
        JSON file of the outcome.
    on_event : callable
        Called with ``scale`` and ``loss`` after each.

    Returns
    -------
    ScaleSearch
    """
    loaded = base.load()
    found = tune_scale(
        loaded.model,
        given.adapters_in_memory(),
        name,
        sample.together(loaded),
        scales,
        progress=lambda scale, loss: on_event({"scale": scale, "loss": loss}),
        factors=given.read_factors(),
        statistics=given.read_statistics(),
        rank=given.rank,
        seed=given.seed,
    )
    write_json(target, asdict(found))
    return found
