"""What a training is given and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tclora.model.tokens import TokenRow

StepCallback = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and after how many steps.

    Attributes
    ----------
    folder : Path
        Directory of the checkpoint.
    every : int
        Steps between checkpoints.
    """

    folder: Path
    every: int = 20


@dataclass(frozen=True)
class TrainingResult:
    """What a training job returns.

    Attributes
    ----------
    history : tuple of dict
        Per step: step, loss (nats per response token), lr, grad_norm, tokens (supervised),
        tokens_per_s (all of the adapter's), padding (share of the positions computed, 0 to 1),
        seconds, memory (peak of the process, or of its GPU, bytes), and validation_nll (nats per
        response token) after steps that looked at it.
    steps : int
        Optimiser steps.
    supervised_tokens : int
        Response tokens seen, repetitions counted.
    final_loss : float
        Mean over the last tenth of the steps, nats per response token.
    seconds : float
        Wall-clock time from where it takes its place in the job; less than the whole after a
        resume.
    validation_nll : float or None
        Lowest loss on the rows held out, nats per response token; the adapter is the one that had
        it. None where no rows were held out.
    """

    history: tuple[dict[str, float], ...]
    steps: int
    supervised_tokens: int
    final_loss: float
    seconds: float
    validation_nll: float | None = None


@dataclass(frozen=True)
class StepLoss:
    """What the forward and backward passes of one step have shown.

    Attributes
    ----------
    loss : float
        Mean over the step's supervised tokens, nats.
    tokens, read : int
        Supervised tokens of the step, and all tokens of its rows.
    padding : float
        Share of the positions computed that hold no token (0 to 1); of a step shared with other
        adapters, that of all.
    memory : int
        Peak of the process so far, or of its GPU (bytes).
    """

    loss: float
    tokens: int
    read: int
    padding: float
    memory: int


@dataclass(frozen=True)
class Destination:
    """What becomes of a training.

    Attributes
    ----------
    target : Path
        Directory of the finished adapter, which bears the directory's name.
    base_model : str
        What the adapter's configuration names as its base.
    checkpoint : Checkpoint or None
        Where and how often to write checkpoints; also after the last step.
    on_step : callable
        Called after each step with its record; after a resume, with the earlier ones first.
    writes : bool
        Whether files are written; else checkpoints are resumed only.
    """

    target: Path
    base_model: str
    checkpoint: Checkpoint | None = None
    on_step: StepCallback = lambda _: None
    writes: bool = True


@dataclass(frozen=True)
class Trainee:
    """An adapter to train.

    Attributes
    ----------
    rows : sequence of TokenRow
        At least one.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    destination : Destination
        Where checkpoints, records and the adapter go.
    """

    rows: Sequence[TokenRow]
    seed: int
    init_seed: int
    destination: Destination
