"""What a training engine is, and the registry of them.

An engine says which adapters share a job, and trains those of one job. Every adapter must come out
as if it had been trained alone, so that the choice is one of speed and memory only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.registry import Registry
from tclora.train.records import TrainingResult


class AdapterRequest(BaseModel):
    """One adapter to train.

    Attributes
    ----------
    name : str
        What events and results call it.
    rows : Path
        Its rows in tokens (`tclora.model.token_file`), or a Parquet file of examples (columns
        prompt, response).
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
