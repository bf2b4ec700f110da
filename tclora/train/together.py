"""The engine `together`: the adapters of a job side by side, on one copy of the base model."""

from collections.abc import Mapping, Sequence

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.jobs.devices import visible_gpus
from tclora.model.base import Base
from tclora.train.records import TrainingResult
from tclora.train.registry import AdapterRequest, engines
from tclora.train.requests import train_requests


class Together:
    """The adapters of a device side by side, on one base model; see `tclora.train.job`."""

    def divide(self, sizes: Mapping[str, int], slots: int) -> list[list[str]]:
        """Put all adapters in one job; with several GPUs and slots, in one for each.

        Rows are spread evenly. Without a GPU there is one job, which has all cores.
        """
        count = max(1, min(slots, len(visible_gpus()), len(sizes)))
        groups: list[list[str]] = [[] for _ in range(count)]
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            min(groups, key=lambda group: sum(sizes[member] for member in group)).append(name)
        return [group for group in groups if group]

    def train(
        self,
        base: Base,
        requests: Sequence[AdapterRequest],
        config: AdapterConfig,
        *,
        checkpoint_steps: int,
        on_event: EventCallback,
    ) -> dict[str, TrainingResult]:
        """Train the adapters side by side."""
        return train_requests(base, requests, config, checkpoint_steps, on_event)


engines.register("together")(Together())
