"""Training engines: how the adapters of a run are trained, chosen by name (``train.engine``).

An engine says which adapters share a job, and trains those of one job. Every adapter must come out
as if it had been trained alone, so that the choice is one of speed and memory only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.registry import Registry
from tclora.train.loop import Checkpoint, TrainingResult, train_adapter


class AdapterRequest(BaseModel):
    """One adapter to train.

    Attributes
    ----------
    name : str
        What events and results call it.
    rows : Path
        Parquet file of its examples (columns prompt, response).
    target : Path
        Directory of the finished adapter.
    checkpoint : Path
        Directory of its checkpoint; one of other rows, settings or seeds must not be there.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: Path
    target: Path
    checkpoint: Path
    seed: int = 0
    init_seed: int = 0


class TrainingEngine(Protocol):
    """Rows of several adapters in, adapters out."""

    def divide(self, sizes: Mapping[str, int], slots: int) -> list[list[str]]:
        """Say which adapters share a job.

        Parameters
        ----------
        sizes : Mapping[str, int]
            Adapter name → number of its rows.
        slots : int
            Jobs that run at once.

        Returns
        -------
        list of list of str
            Every name once; jobs start in this order.
        """

    def train(
        self,
        base: Base,
        requests: Sequence[AdapterRequest],
        config: AdapterConfig,
        *,
        checkpoint_steps: int,
        on_event: EventCallback,
    ) -> dict[str, TrainingResult]:
        """Train the adapters of one job; every step is an event with the adapter's ``name``."""


engines: Registry[TrainingEngine] = Registry("training engine")


class Separate:
    """One adapter after the other, each in a job of its own on a base model of its own."""

    def divide(self, sizes: Mapping[str, int], slots: int) -> list[list[str]]:
        """Give every adapter its own job; the longest starts first."""
        return [[name] for name in sorted(sizes, key=lambda name: -sizes[name])]

    def train(
        self,
        base: Base,
        requests: Sequence[AdapterRequest],
        config: AdapterConfig,
        *,
        checkpoint_steps: int,
        on_event: EventCallback,
    ) -> dict[str, TrainingResult]:
        """Train the adapters in turn."""
        return {
            request.name: _train_one(base, request, config, checkpoint_steps, on_event)
            for request in requests
        }


engines.register("separate")(Separate())


def train_adapters(
    *,
    engine: str,
    base: Base,
    requests: list[AdapterRequest],
    config: AdapterConfig,
    checkpoint_steps: int = 20,
    on_event: EventCallback = lambda _: None,
) -> dict[str, TrainingResult]:
    """Train adapters by a registered engine; the job of a run.

    Parameters
    ----------
    engine : str
        Name in `engines`.
    base : Base
        The base model.
    requests : list of AdapterRequest
        At least one.
    config : AdapterConfig
        Rank, learning rate, batch and so on, the same for all.
    checkpoint_steps : int
        Steps between checkpoints.
    on_event : callable
        Called after each step with the adapter's name and the step's record.

    Returns
    -------
    dict of str to TrainingResult
        Adapter name → what became of it.

    Raises
    ------
    ModelError
        If the target modules match nothing in the model.
    NonFiniteLossError
        If a loss becomes NaN or infinite.
    """
    return engines[engine].train(
        base, requests, config, checkpoint_steps=checkpoint_steps, on_event=on_event
    )


def _train_one(
    base: Base,
    request: AdapterRequest,
    config: AdapterConfig,
    checkpoint_steps: int,
    on_event: EventCallback,
) -> TrainingResult:
    loaded = base.load()

    def on_step(record: dict[str, Any]) -> None:
        on_event({"name": request.name, **record})

    return train_adapter(
        loaded.model,
        loaded.encode(request.rows),
        config,
        request.target,
        base_model=base.location,
        seed=request.seed,
        init_seed=request.init_seed,
        checkpoint=Checkpoint(request.checkpoint, checkpoint_steps),
        on_step=on_step,
    )
