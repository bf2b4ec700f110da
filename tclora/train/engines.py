"""Training engines: how the adapters of a run are trained, chosen by name (``train.engine``)."""

import tclora.train.separate
import tclora.train.together  # noqa: F401  # both register themselves
from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.train.records import TrainingResult
from tclora.train.registry import AdapterRequest, TrainingEngine, engines

__all__ = ["AdapterRequest", "TrainingEngine", "engines", "train_adapters"]


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
