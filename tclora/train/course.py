"""One adapter's course: rows of every step, optimiser, history, checkpoints, the finished adapter.

What computes the gradients is another matter: alone (`tclora.train.loop`) or with other adapters in
the same batches (`tclora.train.together`).
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import AdapterConfig
from tclora.errors import NonFiniteLossError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of
from tclora.train.optimiser import AdapterOptimiser
from tclora.train.records import Destination, StepLoss, TrainingResult

logger = logging.getLogger(__name__)

_VALIDATIONS = 10  # per training, unless configured otherwise


class Course:
    """One adapter on its way from A_0 to the finished adapter.

    Parameters
    ----------
    weights : Mapping[str, Parameter]
        PEFT's name → weight in the model; see `tclora.train.lora`.
    n_rows : int
        Rows it is trained on, those held out not among them.
    config : AdapterConfig
        Rank, learning rate, batch and so on.
    seed : int
        Seed of the row order.
    destination : Destination
        Where checkpoints, records and the adapter go. A checkpoint that is there is resumed.
    validate : callable, optional
        Returns the loss on rows held out (nats per response token) with the weights as they are.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        n_rows: int,
        config: AdapterConfig,
        *,
        seed: int,
        destination: Destination,
        validate: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.total = _steps(n_rows, config)
        self.destination = destination
        self._validate = validate
        self._every = config.validation_steps or max(1, self.total // _VALIDATIONS)
        self._n_rows, self._seed = n_rows, seed
        self._started = self._previous = time.monotonic()
        self._optimiser = AdapterOptimiser(weights, config, self.total)
        self.history = self._resume()
        for record in self.history:
            destination.on_step(record)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.destination.target.name

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or the loss on the rows held out has stopped falling."""
        return len(self.history) >= self.total or self._stale()

    def orders(self, start: int) -> Iterator[list[int]]:
        """Yield the row indices of every step from `start` on, until the course is done."""
        steps = _step_rows(self._n_rows, self.total, self.config.batch_size, self._seed)
        for step, rows in enumerate(islice(steps, start, None), start):
            if self.done and step >= len(self.history):
                return
            yield rows

    def advance(self, seen: StepLoss) -> None:
        """Take the next step along the gradients that the weights hold.

        Raises
        ------
        NonFiniteLossError
            If the loss or its gradient is NaN or infinite.
        """
        step = len(self.history)
        self._check_finite("loss", seen.loss)
        taken = self._optimiser.step()
        self._check_finite("gradient", taken["grad_norm"])
        record = {
            "step": step,
            "loss": seen.loss,
            **taken,
            "tokens": seen.tokens,
            "padding": seen.padding,
        }
        if self._validate and ((step + 1) % self._every == 0 or step + 1 == self.total):
            record["validation_nll"] = self._look(self._validate())
        now = time.monotonic()
        record |= {
            "tokens_per_s": seen.read / (now - self._previous),
            "seconds": now - self._started,
            "memory": seen.memory,
        }
        self._previous = now
        self.history.append(record)
        self.destination.on_step(record)
        checkpoint = self.destination.checkpoint if self.destination.writes else None
        if checkpoint and ((step + 1) % checkpoint.every == 0 or self.done):
            self._optimiser.save(checkpoint.folder, self.history)

    def _look(self, nll: float) -> float:
        """Keep the weights where they are the best so far on the rows held out."""
        self._check_finite("validation loss", nll)
        if nll < min(self._validations(), default=math.inf):
            self._optimiser.keep()
        return nll

    def _validations(self) -> list[float]:
        return [r["validation_nll"] for r in self.history if "validation_nll" in r]

    def _stale(self) -> bool:
        """Whether the last `patience` validations brought nothing lower."""
        seen, patience = self._validations(), self.config.patience
        if patience is None or not seen:
            return False
        return len(seen) - 1 - seen.index(min(seen)) >= patience

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{what} of adapter {self.name!r} became {value} at step {len(self.history)}; "
                f"lower train.lr (now {self.config.lr}) or set train.dtype=float32"
            )

    def stand(self) -> None:
        """Forget the gradients that the weights hold: of a step taken before a resume."""
        self._optimiser.discard()

    def finish(self) -> TrainingResult:
        """Write the adapter, the best one where rows were held out; return the result."""
        target, base_model = self.destination.target, self.destination.base_model
        weights = self._optimiser.best or self._optimiser.masters
        factors = _factors(weights, self.config.scaling)
        if self.destination.writes:
            write_adapter(Adapter(self.name, factors, base_model), target)
        tail = self.history[-max(1, len(self.history) // 10) :]
        return TrainingResult(
            history=tuple(self.history),
            steps=len(self.history),
            supervised_tokens=int(sum(record["tokens"] for record in self.history)),
            final_loss=sum(record["loss"] for record in tail) / len(tail),
            seconds=time.monotonic() - self._started,
            validation_nll=min(self._validations(), default=None),
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
    """Return the number of optimiser steps for that many rows, those to be held out among them."""
    return _steps(n_rows - _held_out(n_rows, config.validation_fraction), config)


def hold_out(n_rows: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide rows into those to train on and those to watch the loss on, at random.

    Parameters
    ----------
    n_rows : int
        At least one; one row alone is not held out.
    fraction : float
        Share held out (0 to 1), rounded to at least one row; 0: none.
    seed : int
        Seed of the choice.

    Returns
    -------
    tuple of list
        Numbers of rows, ascending: to train on, held out.
    """
    count = _held_out(n_rows, fraction)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values.tolist(), order[:count].sort().values.tolist()


def peak_memory() -> int:
    """Return the largest memory of this process so far, on its GPU where it has one (bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _held_out(n_rows: int, fraction: float) -> int:
    return min(n_rows - 1, max(1, round(n_rows * fraction))) if fraction else 0


def _steps(n_rows: int, config: AdapterConfig) -> int:
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
            A = masters[name].cpu().clone()  # not part of a longer vector
            modules[module_of(name)] = LoraFactors(B.cpu().contiguous(), A)
    return dict(sorted(modules.items()))
