"""One adapter's optimiser: fp32 masters, steps split to a token budget, safe checkpoints."""

import json
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from tclora.config import AdapterConfig
from tclora.errors import NonFiniteLossError
from tclora.files import atomic_path
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches

logger = logging.getLogger(__name__)


class Trainer:
    """Optimiser state of one adapter: fp32 master weights, whatever the model's precision."""

    def __init__(self, model: PeftModel, config: AdapterConfig, total: int) -> None:
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
