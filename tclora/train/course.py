"""One adapter's course: rows of every step, optimiser, history, checkpoints, the finished adapter.

What computes the gradients is another matter: alone (`tclora.train.loop`) or with other adapters in
the same batches (`tclora.train.together`).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import AdapterConfig
from tclora.errors import NonFiniteLossError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of
from tclora.train.optimiser import AdapterOptimiser

logger = logging.getLogger(__name__)

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
        Per step: step, loss (nats per response token), lr, grad_norm, tokens (supervised), seconds.
    steps : int
        Optimiser steps.
    supervised_tokens : int
        Response tokens seen, repetitions counted.
    final_loss : float
        Mean over the last tenth of the steps, nats per response token.
    seconds : float
        Wall-clock time of this process; less than the whole after a resume.
    """

    history: tuple[dict[str, float], ...]
    steps: int
    supervised_tokens: int
    final_loss: float
    seconds: float


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
    """

    target: Path
    base_model: str
    checkpoint: Checkpoint | None = None
    on_step: StepCallback = lambda _: None


class Course:
    """One adapter on its way from A_0 to the finished adapter.

    Parameters
    ----------
    weights : Mapping[str, Parameter]
        PEFT's name → weight in the model; see `tclora.train.lora`.
    n_rows : int
        Rows it is trained on.
    config : AdapterConfig
        Rank, learning rate, batch and so on.
    seed : int
        Seed of the row order.
    destination : Destination
        Where checkpoints, records and the adapter go. A checkpoint that is there is resumed.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        n_rows: int,
        config: AdapterConfig,
        *,
        seed: int,
        destination: Destination,
    ) -> None:
        self.config = config
        self.total = total_steps(n_rows, config)
        self.destination = destination
        self._n_rows, self._seed = n_rows, seed
        self._started = time.monotonic()
        self._optimiser = AdapterOptimiser(weights, config, self.total)
        self.history = self._resume()
        for record in self.history:
            destination.on_step(record)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.destination.target.name

    def orders(self, start: int) -> Iterator[list[int]]:
        """Yield the row indices of every step from `start` on."""
        steps = _step_rows(self._n_rows, self.total, self.config.batch_size, self._seed)
        return islice(steps, start, None)

    def advance(self, loss: float, tokens: int) -> None:
        """Take the next step along the gradients that the weights hold.

        Parameters
        ----------
        loss : float
            Mean over the step's supervised tokens, nats.
        tokens : int
            Supervised tokens of the step.

        Raises
        ------
        NonFiniteLossError
            If the loss is NaN or infinite.
        """
        step = len(self.history)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"loss of adapter {self.name!r} became {loss} at step {step}; lower train.lr "
                f"(now {self.config.lr}) or set train.dtype=float32"
            )
        taken = self._optimiser.step()
        seconds = time.monotonic() - self._started
        self.history.append(
            {"step": step, "loss": loss, **taken, "tokens": tokens, "seconds": seconds}
        )
        self.destination.on_step(self.history[-1])
        checkpoint, done = self.destination.checkpoint, step + 1
        if checkpoint and (done % checkpoint.every == 0 or done == self.total):
            self._optimiser.save(checkpoint.folder, self.history)

    def stand(self) -> None:
        """Forget the gradients that the weights hold: of a step taken before a resume."""
        self._optimiser.discard()

    def finish(self) -> TrainingResult:
        """Write the adapter; return the result."""
        target, base_model = self.destination.target, self.destination.base_model
        scaling = self.config.alpha / self.config.r
        factors = _factors(self._optimiser.masters, scaling)
        write_adapter(Adapter(self.name, factors, base_model), target)
        tail = self.history[-max(1, len(self.history) // 10) :]
        return TrainingResult(
            history=tuple(self.history),
            steps=len(self.history),
            supervised_tokens=int(sum(record["tokens"] for record in self.history)),
            final_loss=sum(record["loss"] for record in tail) / len(tail),
            seconds=time.monotonic() - self._started,
        )

    def _resume(self) -> list[dict[str, float]]:
        """Restore a checkpoint; start afresh if there is none or it cannot be read."""
        checkpoint = self.destination.checkpoint
        if not checkpoint or not checkpoint.folder.is_dir():
            return []
        try:
            return self._optimiser.restore(checkpoint.folder)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning(
                "checkpoint %s cannot be read, training starts afresh: %s",
                checkpoint.folder,
                error,
            )
            return []


def total_steps(n_rows: int, config: AdapterConfig) -> int:
    """Return the number of optimiser steps for that many rows."""
    steps = max(1, math.ceil(n_rows * config.epochs / config.batch_size))
    return min(steps, config.max_steps) if config.max_steps else steps


def _step_rows(n_rows: int, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the row indices of every step: shuffled passes over the rows, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(batch_size, n_rows):
            queue += torch.randperm(n_rows, generator=generator).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _factors(masters: Mapping[str, Tensor], scaling: float) -> dict[str, LoraFactors]:
    """Collect the fp32 masters per module, PEFT's scaling folded into B."""
    modules = {}
    for name in sorted(masters):
        if name.endswith(A_WEIGHT):
            B = masters[name.removesuffix(A_WEIGHT) + B_WEIGHT] * scaling
            modules[module_of(name)] = LoraFactors(B.cpu(), masters[name].cpu())
    return dict(sorted(modules.items()))
