"""Training one LoRA adapter: loss on responses only, resumable, the same bytes for the same seed.

PEFT places the adapter; the loop is ours because it needs what trainers do not give: logits only at
supervised positions, steps split to a token budget, low-precision adapters with fp32 master weights
on CPU, and checkpoints in safe formats.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import AdapterConfig
from tclora.model.tokens import TokenRow
from tclora.train.lora import attach_lora
from tclora.train.trainer import Trainer

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
        The base; adapter layers are injected into it.
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
        If the target modules match nothing in the model.
    NonFiniteLossError
        If the loss becomes NaN or infinite.
    """
    started = time.monotonic()
    peft_model = attach_lora(model, config, init_seed)
    trainer = Trainer(peft_model, config, total_steps(len(rows), config))
    resumed = checkpoint and checkpoint.folder.is_dir()
    history = _resume(trainer, checkpoint.folder) if checkpoint and resumed else []
    for step, order in enumerate(_step_rows(len(rows), trainer.total, config.batch_size, seed)):
        if step < len(history):  # done before the resume
            if on_step:
                on_step(history[step])
            continue
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same after a resume
        record = trainer.step([rows[i] for i in order], step)
        history.append(record | {"seconds": time.monotonic() - started})
        if on_step:
            on_step(history[-1])
        if checkpoint and ((step + 1) % checkpoint.every == 0 or step + 1 == trainer.total):
            trainer.save(checkpoint.folder, history)
    write_adapter(_factors(peft_model, trainer.masters, target.name, base_model), target)
    tail = history[-max(1, len(history) // 10) :]
    return TrainingResult(
        history=tuple(history),
        steps=len(history),
        supervised_tokens=int(sum(record["tokens"] for record in history)),
        final_loss=sum(record["loss"] for record in tail) / len(tail),
        seconds=time.monotonic() - started,
    )


def _resume(trainer: Trainer, folder: Path) -> list[dict[str, float]]:
    """Restore a checkpoint; start afresh if it cannot be read."""
    try:
        return trainer.restore(folder)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("checkpoint %s cannot be read, training starts afresh: %s", folder, error)
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


def _factors(
    model: PeftModel, masters: Mapping[str, Tensor], name: str, base_model: str
) -> Adapter:
    """Collect the fp32 masters per module, PEFT's scaling folded into B."""
    prefix = "base_model.model."
    modules = {}
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        B = masters[f"{path}.lora_B.default.weight"] * layer.scaling["default"]
        A = masters[f"{path}.lora_A.default.weight"]
        modules[path.removeprefix(prefix)] = LoraFactors(B.cpu(), A.cpu())
    return Adapter(name, dict(sorted(modules.items())), base_model)
