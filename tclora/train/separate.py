"""The engine `separate`: every adapter in a job of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.train.course import Checkpoint, TrainingResult
from tclora.train.loop import train_adapter
from tclora.train.registry import AdapterRequest, engines


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
