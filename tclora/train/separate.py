"""The engine `separate`: every adapter in a job of its own."""

from collections.abc import Mapping, Sequence

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.train.records import TrainingResult
from tclora.train.registry import AdapterRequest, engines
from tclora.train.requests import train_requests


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
        found: dict[str, TrainingResult] = {}
        for request in requests:
            found |= train_requests(base, [request], config, checkpoint_steps, on_event)
        return found


engines.register("separate")(Separate())
