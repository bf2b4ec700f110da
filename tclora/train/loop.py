"""Training one LoRA adapter: resumable; on a CPU the same bytes for seed and threads."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.model.tokens import TokenRow
from tclora.train.job import train_side_by_side
from tclora.train.records import (
    Checkpoint,
    Destination,
    StepCallback,
    Trainee,
    TrainingResult,
)


def train_adapter(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    config: AdapterConfig,
    target: Path,
    *,
    base_model: str,
    seed: int = 0,
    init_seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: StepCallback | None = None,
) -> TrainingResult:
    """Train a LoRA adapter on token rows and write it as a stock PEFT directory.

    Parameters
    ----------
    model : PreTrainedModel
        The base in evaluation mode; it serves nothing else afterwards.
    rows : sequence of TokenRow
        At least one.
    config : AdapterConfig
        Rank, learning rate, batch and so on.
    target : Path
        Directory of the finished adapter.
    base_model : str
        What the adapter's configuration names as its base.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    checkpoint : Checkpoint, optional
        Where and how often to write checkpoints; also after the last step. If there is one,
        training resumes there and ends with the same adapter; the caller makes sure that it belongs
        to the same rows, configuration and seeds, and removes it.
    on_step : callable, optional
        Called after each step with its record; after a resume, with the earlier ones too.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ModelError
        If the target modules match nothing in the model, or if one row alone exceeds the device's
        memory.
    NonFiniteLossError
        If the loss becomes NaN or infinite.
    """
    destination = Destination(target, base_model, checkpoint, on_step or (lambda _: None))
    trainee = Trainee(rows, seed, init_seed, destination)
    return train_side_by_side(model, {target.name: trainee}, config)[target.name]
