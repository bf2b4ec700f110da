"""Training one LoRA adapter: loss on responses only, resumable, the same bytes for the same seed.

PEFT places the adapter; the loop is ours because it needs what trainers do not give: logits only at
supervised positions, steps split to a token budget, low-precision adapters with fp32 master weights
on CPU, and checkpoints in safe formats.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import TrainConfig
from tclora.errors import ModelError, NonFiniteLossError
from tclora.files import atomic_path
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches

logger = logging.getLogger(__name__)

StepCallback = Callable[[dict[str, float]], None]


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
    config: TrainConfig,
    target: Path,
    *,
    base_model: str,
    seed: int = 0,
    init_seed: int = 0,
    checkpoint: Path | None = None,
    on_step: StepCallback | None = None,
) -> TrainingResult:
    """Train a LoRA adapter on token rows and write it as a stock PEFT directory.

    Parameters
    ----------
    model : PreTrainedModel
        The base; adapter layers are injected into it.
    rows : sequence of TokenRow
        At least one.
    config : TrainConfig
        Rank, learning rate, batch and so on.
    target : Path
        Directory of the finished adapter.
    base_model : str
        What the adapter's configuration names as its base.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    checkpoint : Path, optional
        Directory of the checkpoint: written every `config.checkpoint_steps` and after the last
        step. If it exists, training resumes there and ends with the same adapter; the caller makes
        sure that it belongs to the same rows, configuration and seeds, and removes it.
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
    trainer = _Trainer(peft_model, config, total_steps(len(rows), config))
    history = _resume(trainer, checkpoint) if checkpoint and checkpoint.is_dir() else []
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
        if checkpoint and ((step + 1) % config.checkpoint_steps == 0 or step + 1 == trainer.total):
            trainer.save(checkpoint, history)
    write_adapter(_factors(peft_model, trainer.masters, target.name, base_model), target)
    tail = history[-max(1, len(history) // 10) :]
    return TrainingResult(
        history=tuple(history),
        steps=len(history),
        supervised_tokens=int(sum(record["tokens"] for record in history)),
        final_loss=sum(record["loss"] for record in tail) / len(tail),
        seconds=time.monotonic() - started,
    )


def _resume(trainer: "_Trainer", checkpoint: Path) -> list[dict[str, float]]:
    """Restore a checkpoint; start afresh if it cannot be read."""
    try:
        return trainer.restore(checkpoint)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning(
            "checkpoint %s cannot be read, training starts afresh: %s", checkpoint, error
        )
        return []


def total_steps(n_rows: int, config: TrainConfig) -> int:
    """Return the number of optimiser steps for that many rows."""
    steps = max(1, math.ceil(n_rows * config.epochs / config.batch_size))
    return min(steps, config.max_steps) if config.max_steps else steps


def attach_lora(model: PreTrainedModel, config: TrainConfig, seed: int) -> PeftModel:
    """Inject a fresh LoRA adapter into the model.

    Raises
    ------
    ModelError
        If `config.target_modules` matches no module; the message lists what could be targeted.
    """
    targets = config.target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(
                f"train.target_modules {targets!r} matches no linear layer of the base model; "
                f"its layers are {linear_layer_names(model)}"
            ) from error
    return peft_model


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """List the distinct last names of the model's linear layers."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )


def _step_rows(n_rows: int, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the row indices of every step: shuffled passes over the rows, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(batch_size, n_rows):
            queue += torch.randperm(n_rows, generator=generator).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]


class _Trainer:
    """Optimiser state of one adapter: fp32 master weights, whatever the model's precision."""

    def __init__(self, model: PeftModel, config: TrainConfig, total: int) -> None:
        self.model = model
        self.config = config
        self.total = total
        self.params = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not (config.freeze_a and ".lora_A." in name)
        }
        self.masters = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.params)
        trained = [self.masters[name] for name in self.params]
        self.optimiser = torch.optim.AdamW(
            trained, lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        self.scheduler = get_scheduler(
            config.schedule,
            self.optimiser,
            num_warmup_steps=round(config.warmup_fraction * total),
            num_training_steps=total,
        )
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def step(self, rows: Sequence[TokenRow], step: int) -> dict[str, float]:
        """One optimiser step: mean loss over the supervised tokens of all its rows."""
        tokens = sum(len(row.response) for row in rows)
        loss = 0.0
        # What pads is masked out, so that any token serves.
        for batch in batches(rows, pad_id=0, token_budget=self.config.tokens_per_forward):
            part = response_nll(self.model, batch).sum() / tokens
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"loss became {loss} at step {step}; lower train.lr (now {self.config.lr}) "
                "or set train.dtype=float32"
            )
        for name, parameter in self.params.items():
            grad = parameter.grad
            self.masters[name].grad = None if grad is None else grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(
            [self.masters[name] for name in self.params], self.config.max_grad_norm
        )
        lr = self.scheduler.get_last_lr()[0]
        self.optimiser.step()
        self.scheduler.step()
        self._copy_back()
        return {"step": step, "loss": loss, "lr": lr, "grad_norm": norm.item(), "tokens": tokens}

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(self.masters[name])

    def save(self, folder: Path, history: list[dict[str, float]]) -> None:
        """Write masters, optimiser moments and the loss history, atomically."""
        tensors = {f"master/{name}": master for name, master in self.masters.items()}
        for name in self.params:
            for key, value in self.optimiser.state[self.masters[name]].items():
                tensors[f"{key}/{name}"] = value
        with atomic_path(folder) as fresh:
            fresh.mkdir()
            save_file({k: v.contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
            (fresh / "history.json").write_text(json.dumps(history))

    def restore(self, folder: Path) -> list[dict[str, float]]:
        """Load a checkpoint of the same adapter; return its history."""
        tensors = load_file(folder / "state.safetensors", device=str(self.model.device))
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master/{name}"])
        self._copy_back()
        for name in self.params:
            self.optimiser.state[self.masters[name]] = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        history: list[dict[str, float]] = json.loads((folder / "history.json").read_text())
        self.scheduler.last_epoch = len(history) - 1
        with warnings.catch_warnings():  # of a missing optimiser step: it was in the earlier run
            warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step()
        logger.info("resumed at step %d of %d", len(history), self.total)
        return history


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
