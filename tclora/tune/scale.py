"""The scale λ of a merge, and its density, chosen by the base model's loss on sample rows.

Methods that add updates up (task arithmetic, TIES, TSV-M and others) depend on λ more than on
anything else, so that they can be compared at a scale chosen in the same way for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import module_names
from tclora.files import write_json
from tclora.jobs.call import EventCallback
from tclora.merge.engine import merge
from tclora.merge.inputs import MergeInputs
from tclora.merge.registry import get
from tclora.model.base import Base
from tclora.model.cluster_loss import TOKEN_BUDGET, ClusterLoss
from tclora.model.sample import Sample
from tclora.model.tokens import TokenRow

GRID = (0.2, 0.4, 0.7, 1.0)
_EXTENSIONS = 6  # steps beyond the grid's ends

Measure = Callable[[float], float]


@dataclass(frozen=True)
class ScaleSearch:
    """The outcome of a search.

    Attributes
    ----------
    scale : float
        The scale with the lowest loss.
    losses : Mapping[float, float]
        Scale → mean over clusters of the response NLL (nats per token) on the sample rows, at the
        density chosen.
    density : float or None
        The density with the lowest loss; None where none was searched.
    """

    scale: float
    losses: Mapping[float, float]
    density: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `merge` is to be given."""
        chosen = {} if self.density is None else {"density": self.density}
        return {"scale": self.scale, **chosen}


def is_scaled(method: str) -> bool:
    """Whether a method has a scale."""
    return "scale" in get(method).info.options


def is_sparse(method: str) -> bool:
    """Whether a method has a density."""
    return "density" in get(method).info.options


def tune_scale(
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    method: str,
    rows: Mapping[str, Sequence[TokenRow]],
    scales: Sequence[float] = GRID,
    *,
    densities: Sequence[float] = (),
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[float, float], None] | None = None,
    **settings: Any,  # noqa: ANN401
) -> ScaleSearch:
    """Choose the scale of a merge, and its density where it has one.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    adapters : sequence of K Adapter
        What is merged.
    method : str
        A method with a scale.
    rows : Mapping[str, sequence of TokenRow]
        Cluster → its sample rows; every cluster counts the same.
    scales : sequence of float
        The grid; it goes on beyond an end as long as the best scale lies there.
    densities : sequence of float
        Densities to try, for a method that has one; empty: its own default.
    token_budget : int
        Positions per forward pass.
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

    Notes
    -----
    A merge is proportional to λ, so that each density is merged once.
    """
    if not is_scaled(method):
        raise ValueError(f"method must have a scale to tune, {method} has none")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive and at least one, got {list(scales)}")
    losses = ClusterLoss(model, rows, module_names(adapters), token_budget=token_budget)
    found: list[ScaleSearch] = []
    for density in densities if densities and is_sparse(method) else [None]:
        chosen: dict[str, Any] = {} if density is None else {"density": density}
        merged = merge(adapters, method, **settings, **chosen, scale=1.0).adapter

        def measure(scale: float, merged: Adapter = merged) -> float:
            loss = losses.mean(scaled(merged, scale))
            if progress:
                progress(scale, loss)
            return loss

        start = _around(min(found, key=_loss)) if found else sorted(set(scales))
        found.append(replace(_on_line(measure, start), density=density))
    return min(found, key=_loss)


def _loss(search: ScaleSearch) -> float:
    return min(search.losses.values())


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Return λ times an adapter."""
    modules = {m: LoraFactors(f.B * scale, f.A) for m, f in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _around(best: ScaleSearch) -> list[float]:
    """Return the best scale of another density and those next to it."""
    known = sorted(best.losses)
    at = known.index(best.scale)
    return known[max(0, at - 1) : at + 2]


def _on_line(measure: Measure, scales: Sequence[float]) -> ScaleSearch:
    """Measure a grid of scales, and go on beyond an end as long as the best one lies there.

    Parameters
    ----------
    measure : callable
        Scale → loss.
    scales : sequence of float
        In rising order; beyond the ends the last ratio goes on.

    Returns
    -------
    ScaleSearch
    """
    losses = {scale: measure(scale) for scale in scales}
    ratio = scales[-1] / scales[-2] if len(scales) > 1 else 2.0
    for _ in range(_EXTENSIONS):
        known = sorted(losses)
        best = min(losses, key=losses.__getitem__)
        if best == known[-1]:
            beyond = known[-1] * ratio
        elif best == known[0]:
            beyond = known[0] / ratio
        else:
            break
        losses[beyond] = measure(beyond)
    return ScaleSearch(min(losses, key=losses.__getitem__), losses)


def choose_scale(
    *,
    name: str,
    base: Base,
    sample: Sample,
    given: MergeInputs,
    scales: list[float],
    densities: list[float],
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
    scales, densities : list of float
        The grids.
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
        sample.token_rows(loaded),
        scales,
        densities=densities,
        token_budget=sample.token_budget,
        progress=lambda scale, loss: on_event({"scale": scale, "loss": loss}),
        factors=given.read_factors(),
        statistics=given.read_statistics(),
        rank=given.rank,
        seed=given.seed,
    )
    write_json(target, asdict(found))
    return found
