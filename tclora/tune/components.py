"""Weights of components or clusters fitted by the base model's own loss on a few examples.

Base model, U and V stay frozen; what is fitted are R numbers per module, or K numbers in all.

Symbols: K adapters, R the CP rank, d_out × d_in a module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tclora.adapter import Adapter, LoraFactors, read_adapter, write_adapter
from tclora.jobs.call import EventCallback
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.model.reading import head_among, reading
from tclora.model.sample import Sample
from tclora.model.tokens import TokenRow
from tclora.tensor.library import LibraryFactors

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Refit:
    """The outcome of a fit.

    Attributes
    ----------
    adapter : Adapter
        The merge with the weights of the best step.
    loadings : Mapping[str, float]
        Fitted weight of every cluster; empty where components were fitted.
    losses : tuple of float
        Mean response NLL in nats per token before each step.
    """

    adapter: Adapter
    loadings: Mapping[str, float]
    losses: tuple[float, ...]


def fit_components(
    model: PreTrainedModel,
    adapter: Adapter,
    rows: Sequence[TokenRow],
    *,
    token_budget: int = 1024,
    n_steps: int = 20,
    learning_rate: float = 0.1,
    progress: Progress | None = None,
) -> Refit:
    """Fit one factor per component of a merged adapter, starting from 1.

    Parameters
    ----------
    model : PreTrainedModel
        The base model in evaluation mode, without adapters.
    adapter : Adapter
        Any merge; column ρ of each B is scaled by the fitted factor.
    rows : sequence of TokenRow
        Sample rows of all clusters, in equal shares.
    token_budget : int
        Positions per forward pass.
    n_steps : int
        Steps of Adam, each over all rows.
    learning_rate : float
        Step size of Adam.
    progress : callable, optional
        Called with (step, mean response NLL before it).

    Returns
    -------
    Refit
    """
    gates = {
        module: torch.ones(factors.rank, device=model.device)
        for module, factors in adapter.modules.items()
    }
    best, losses = _fit(
        model,
        adapter,
        rows,
        _Fit(list(gates.values()), lambda: gates, token_budget, n_steps, learning_rate, progress),
    )
    fitted = dict(zip(gates, best, strict=True))
    modules = {m: _scaled(f, fitted[m]) for m, f in adapter.modules.items()}
    return Refit(replace(adapter, modules=modules), {}, losses)


def fit_loadings(
    model: PreTrainedModel,
    factors: LibraryFactors,
    rows: Sequence[TokenRow],
    *,
    token_budget: int = 1024,
    n_steps: int = 20,
    learning_rate: float = 0.05,
) -> Refit:
    """Fit one weight λ_k per cluster in U diag(Σ_k λ_k C[k]) Vᵀ, starting from 1 / K.

    Parameters
    ----------
    model, rows, token_budget, n_steps, learning_rate
        As in `fit_components`; there are fewer weights, each with a larger effect.
    factors : LibraryFactors
        Joint factors of the clusters.

    Returns
    -------
    Refit
        Its loadings are what the method ``tc-lora-calibrated`` takes.
    """
    K = len(factors.names)
    shared = factors.adapter({m: torch.ones(cp.rank) for m, cp in factors.modules.items()})
    C = {m: cp.C.to(model.device, torch.float32) for m, cp in factors.modules.items()}
    weights = torch.full((K,), 1 / K, device=model.device)
    (best,), losses = _fit(
        model,
        shared,
        rows,
        _Fit(
            [weights],
            lambda: {m: weights @ loading for m, loading in C.items()},
            token_budget,
            n_steps,
            learning_rate,
        ),
    )
    merged = factors.adapter({m: (best @ loading).cpu() for m, loading in C.items()})
    loadings = dict(zip(factors.names, best.tolist(), strict=True))
    return Refit(merged, loadings, losses)


@dataclass(frozen=True)
class _Fit:
    """What is fitted, and how: parameters, the gates they give, and the settings of Adam."""

    parameters: Sequence[Tensor]
    gates: Callable[[], Mapping[str, Tensor]]
    token_budget: int
    n_steps: int
    learning_rate: float
    progress: Progress | None = None


def _fit(
    model: PreTrainedModel, adapter: Adapter, rows: Sequence[TokenRow], fit: _Fit
) -> tuple[list[Tensor], tuple[float, ...]]:
    """Minimise the loss over the parameters; return the best ones seen and all losses."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    moved = {
        m: LoraFactors(*(factor.to(model.device, model.dtype) for factor in factors))
        for m, factors in adapter.modules.items()
    }
    here = replace(adapter, modules=moved)  # once, not in every pass
    tokens = sum(len(row.response) for row in rows)
    read = reading(model, max(map(len, rows)), head_trained=head_among(model, adapter.modules))
    parts = list(read.parts(rows, fit.token_budget))
    optimiser = torch.optim.Adam(fit.parameters, lr=fit.learning_rate)
    best: list[Tensor] = []
    losses: list[float] = []
    _require_grad(frozen, False)
    _require_grad(fit.parameters, True)
    try:
        with read.ready():
            for step in range(fit.n_steps + 1):
                optimiser.zero_grad()
                loss, last = 0.0, step == fit.n_steps
                for part in parts:
                    with attached(model, here, fit.gates()), torch.set_grad_enabled(not last):
                        own = read.losses(part).sum() / tokens
                    if not last:  # the last pass tells the loss alone
                        own.backward()
                    loss += float(own.detach())
                if not losses or loss < min(losses):
                    best = [p.detach().clone() for p in fit.parameters]
                losses.append(loss)
                if fit.progress:
                    fit.progress(step, loss)
                optimiser.step()
    finally:
        _require_grad(frozen, True)
    return best, tuple(losses)


def _require_grad(tensors: Sequence[Tensor], needed: bool) -> None:
    for tensor in tensors:
        tensor.requires_grad_(needed)


def _scaled(factors: LoraFactors, gate: Tensor) -> LoraFactors:
    return LoraFactors(factors.B * gate.to(factors.B), factors.A)


def refit_components(
    *,
    name: str,
    base: Base,
    sample: Sample,
    adapter: Path,
    n_steps: int,
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> list[float]:
    """Fit the component weights of a merge on rows of every cluster; the job of a run.

    Parameters
    ----------
    name : str
        The merge method, for messages.
    base : Base
        The base model.
    sample : Sample
        The rows.
    adapter : Path
        PEFT directory of the merge.
    n_steps : int
        Steps of Adam.
    target : Path
        PEFT directory of the result.
    on_event : callable
        Called with ``step`` and ``loss`` before each step.

    Returns
    -------
    list of float
        Mean response NLL (nats per token) before each step.
    """
    loaded = base.load()
    found = fit_components(
        loaded.model,
        read_adapter(adapter),
        [row for part in sample.token_rows(loaded).values() for row in part],
        token_budget=sample.token_budget,
        n_steps=n_steps,
        progress=lambda step, loss: on_event({"step": step, "loss": loss}),
    )
    write_adapter(found.adapter, target)
    return list(found.losses)
