"""Requests of a job turned into adapters, by one process or by several that share the rows."""

from collections.abc import Sequence
from typing import Any

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.train.job import train_side_by_side
from tclora.train.records import (
    Checkpoint,
    Destination,
    StepCallback,
    Trainee,
    TrainingResult,
)
from tclora.train.registry import AdapterRequest
from tclora.train.team import Team, run_team


def train_requests(
    base: Base,
    requests: Sequence[AdapterRequest],
    config: AdapterConfig,
    checkpoint_steps: int,
    on_event: EventCallback,
) -> dict[str, TrainingResult]:
    """Train adapters side by side; see `tclora.train.registry.TrainingEngine.train`."""
    given = (base, requests, config, checkpoint_steps)
    if config.data_parallel == 1:
        return _train(Team(), on_event, *given)
    return run_team(config.data_parallel, _train, on_event, *given)


def _train(
    team: Team,
    on_event: EventCallback,
    base: Base,
    requests: Sequence[AdapterRequest],
    config: AdapterConfig,
    checkpoint_steps: int,
) -> dict[str, TrainingResult]:
    """Train adapters on one copy of the base model in this process, as one of a team."""

    def on_step(name: str) -> StepCallback:
        def send(record: dict[str, Any]) -> None:
            on_event({"name": name, **record})

        return send

    loaded = base.load(config.quantisation)
    trainees = {
        request.name: Trainee(
            loaded.rows(request.rows),
            request.seed,
            request.init_seed,
            Destination(
                request.target,
                base.location,
                Checkpoint(request.checkpoint, checkpoint_steps),
                on_step(request.name),
                writes=team.leads,
            ),
        )
        for request in requests
    }
    return train_side_by_side(loaded.model, trainees, config, team)
