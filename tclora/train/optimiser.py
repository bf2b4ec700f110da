"""One adapter's optimiser: fp32 masters, clipped and scheduled steps, safe checkpoints."""

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from tclora.config import AdapterConfig
from tclora.files import atomic_path

logger = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdapterOptimiser:
    """Optimiser state of one adapter: fp32 master weights, whatever the model's precision.

    Parameters
    ----------
    weights : Mapping[str, Parameter]
        PEFT's name → weight in the model; those that stay as they are get no gradient.
    config : AdapterConfig
        Learning rate, schedule and so on.
    total : int
        Steps of the whole training.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], config: AdapterConfig, total: int
    ) -> None:
        self.config = config
        self.total = total
        self.params = {
            name: weight
            for name, weight in weights.items()
            if not (config.freeze_a and ".lora_A." in name)
        }
        self.masters = {
            name: weight.detach().float().clone()  # equal in value, never the same memory
            for name, weight in weights.items()
        }
        self.best: dict[str, Tensor] | None = None
        for name, weight in weights.items():
            weight.requires_grad_(name in self.params)
        fused = all(master.is_cuda for master in self.masters.values())
        self.optimiser = torch.optim.AdamW(
            self._groups(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            foreach=not fused,
            fused=fused,
        )
        self.scheduler = get_scheduler(
            config.schedule,
            self.optimiser,
            num_warmup_steps=round(config.warmup_fraction * total),
            num_training_steps=total,
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Give B its own learning rate where the configuration does (LoRA+, arXiv 2402.12354)."""
        ratios: dict[float, list[Tensor]] = {}
        for name in self.params:
            ratio = self.config.lr_ratio if ".lora_B." in name else 1.0
            ratios.setdefault(ratio, []).append(self.masters[name])
        return [{"params": own, "lr": self.config.lr * ratio} for ratio, own in ratios.items()]

    def step(self) -> dict[str, float]:
        """Take one step along the weights' gradients; return its lr and its gradient's norm."""
        for name, parameter in self.params.items():
            grad = parameter.grad
            self.masters[name].grad = None if grad is None else grad.float()
        self.discard()
        norm = torch.nn.utils.clip_grad_norm_(
            [self.masters[name] for name in self.params], self.config.max_grad_norm
        )
        lr = self.scheduler.get_last_lr()[0]
        self.optimiser.step()
        self.scheduler.step()
        self._copy_back()
        return {"lr": lr, "grad_norm": norm.item()}

    def discard(self) -> None:
        """Forget the weights' gradients."""
        for parameter in self.params.values():
            parameter.grad = None

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(self.masters[name])

    def keep(self) -> None:
        """Remember the weights as the best so far."""
        self.best = {name: master.clone() for name, master in self.masters.items()}

    def save(self, folder: Path, history: list[dict[str, float]]) -> None:
        """Write masters, the best ones, optimiser moments and the loss history, atomically."""
        tensors = {f"master/{name}": master for name, master in self.masters.items()}
        tensors |= {f"best/{name}": master for name, master in (self.best or {}).items()}
        for name in self.params:
            for key, value in self.optimiser.state[self.masters[name]].items():
                tensors[f"{key}/{name}"] = value
        with atomic_path(folder) as fresh:
            fresh.mkdir()
            save_file({k: v.contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
            (fresh / "history.json").write_text(json.dumps(history))

    def restore(self, folder: Path) -> list[dict[str, float]]:
        """Load a checkpoint of the same adapter; return its history.

        Raises
        ------
        KeyError, OSError, SafetensorError, ValueError
            If it is damaged; nothing is changed then.
        """
        device = next(iter(self.masters.values())).device
        tensors = load_file(folder / "state.safetensors", device=str(device))
        history = _records(json.loads((folder / "history.json").read_text()))
        masters = self._part(tensors, "master", self.masters)
        known = any(name.startswith("best/") for name in tensors)
        best = self._part(tensors, "best", self.masters) if known else None
        moments = {key: self._part(tensors, key, self.params) for key in _MOMENTS}
        steps = {name: tensors[f"step/{name}"] for name in self.params}
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(masters[name])
        self.best = best
        self._copy_back()
        for name in self.params:
            own = {key: part[name] for key, part in moments.items()}
            self.optimiser.state[self.masters[name]] = {"step": steps[name], **own}
        self.scheduler.last_epoch = len(history) - 1
        with warnings.catch_warnings():  # of a missing optimiser step: it was in the earlier run
            warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step()
        logger.info("resumed at step %d of %d", len(history), self.total)
        return history

    def _part(
        self, tensors: Mapping[str, Tensor], kind: str, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """Return the tensors of one kind, each of the shape of its weight."""
        found = {name: tensors[f"{kind}/{name}"] for name in names}
        for name, tensor in found.items():
            if tensor.shape != self.masters[name].shape:
                raise ValueError(
                    f"{kind}/{name} must be of shape {tuple(self.masters[name].shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
        return found


def _records(history: object) -> list[dict[str, float]]:
    """Return a history that holds one record per step, or raise ValueError."""
    if not isinstance(history, list) or any(
        not isinstance(record, dict) or record.get("step") != step or "loss" not in record
        for step, record in enumerate(history)
    ):
        raise ValueError("history.json must be a list of one record per step")
    return history
