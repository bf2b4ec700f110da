"""One adapter's optimiser: fp32 masters, clipped and scheduled steps, safe checkpoints."""

import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from tclora.config import AdapterConfig
from tclora.files import atomic_path

logger = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Flat:
    """Master weights of equal learning rate, behind each other in one vector.

    Parameters
    ----------
    weights : Mapping[str, Parameter]
        Name → weight in the model, with a gradient.

    Attributes
    ----------
    vector : Tensor
        (n,) float32, all values.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = dict(weights)
        self.vector = torch.cat([_stored(w.detach()).flatten().float() for w in weights.values()])
        self.vector.grad = torch.zeros_like(self.vector)
        self._values = [_stored(weight.detach()) for weight in weights.values()]
        gradients = [weight.grad for weight in weights.values()]
        self._gradients = [_stored(grad) for grad in gradients if grad is not None]
        self._masters = self._parts(self.vector)
        self._master_gradients = self._parts(self.vector.grad)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector in the forms in which the weights are stored."""
        parts = vector.split([value.numel() for value in self._values])
        return [part.view(value.shape) for part, value in zip(parts, self._values, strict=True)]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector of as many values by the weights' names, in views of their shape."""
        parts = zip(self._weights.items(), self._parts(vector), strict=True)
        return {name: part if weight.is_contiguous() else part.mT for (name, weight), part in parts}

    def read_gradients(self) -> None:
        """Take the gradients of the weights in the model."""
        torch._foreach_copy_(self._master_gradients, self._gradients)

    def discard(self) -> None:
        """Set the gradients of the weights in the model to zero."""
        torch._foreach_zero_(self._gradients)

    def write(self) -> None:
        """Give the weights in the model their values."""
        torch._foreach_copy_(self._values, self._masters)


def _stored(weight: Tensor) -> Tensor:
    """Return a weight as it is stored: B transposed (see `tclora.train.updates`)."""
    return weight if weight.is_contiguous() else weight.mT


class AdapterOptimiser:
    """Optimiser state of one adapter: fp32 master weights, whatever the model's precision.

    All of an adapter's weights are one vector, or two where A and B learn at rates of their own: a
    step is a few long operations in place of several for each of hundreds of small matrices.

    Parameters
    ----------
    weights : Mapping[str, Parameter]
        PEFT's name → weight in the model; those that are trained have a gradient.
    config : AdapterConfig
        Learning rate, schedule and so on.
    total : int
        Steps of the whole training.

    Attributes
    ----------
    masters : dict of str to Tensor
        Name → fp32 master weight.
    best : dict of str to Tensor or None
        Those that were kept.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], config: AdapterConfig, total: int
    ) -> None:
        self.config = config
        self.total = total
        self.best: dict[str, Tensor] | None = None
        self._flats = self._of_equal_rate(weights)
        self.masters = {
            name: weight.detach().float().clone()
            for name, weight in weights.items()
            if not weight.requires_grad
        }
        for flat in self._flats.values():
            self.masters |= flat.named(flat.vector)
        vectors = [flat.vector for flat in self._flats.values()]
        fused = all(vector.is_cuda for vector in vectors)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [flat.vector], "lr": config.lr * ratio}
                for ratio, flat in self._flats.items()
            ],
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

    def _of_equal_rate(self, weights: Mapping[str, nn.Parameter]) -> dict[float, _Flat]:
        """Give B its own learning rate where the configuration does (LoRA+, arXiv 2402.12354)."""
        ratios: dict[float, dict[str, nn.Parameter]] = {}
        for name, weight in weights.items():
            if weight.requires_grad:
                ratio = self.config.lr_ratio if ".lora_B." in name else 1.0
                ratios.setdefault(ratio, {})[name] = weight
        return {ratio: _Flat(own) for ratio, own in ratios.items()}

    def step(self) -> dict[str, float]:
        """Take one step along the weights' gradients; return its lr and its gradient's norm.

        Nothing is changed if the norm is not finite.
        """
        for flat in self._flats.values():
            flat.read_gradients()
        self.discard()
        norm = torch.nn.utils.clip_grad_norm_(
            [flat.vector for flat in self._flats.values()], self.config.max_grad_norm
        )
        taken = {"lr": self.scheduler.get_last_lr()[0], "grad_norm": norm.item()}
        if math.isfinite(taken["grad_norm"]):
            self.optimiser.step()
            self.scheduler.step()
            self._write()
        return taken

    def discard(self) -> None:
        """Forget the weights' gradients."""
        for flat in self._flats.values():
            flat.discard()

    def _write(self) -> None:
        for flat in self._flats.values():
            flat.write()

    def keep(self) -> None:
        """Remember the weights as the best so far."""
        self.best = {name: master.clone() for name, master in self.masters.items()}

    def save(self, folder: Path, history: list[dict[str, float]]) -> None:
        """Write masters, the best ones, optimiser moments and the loss history, atomically."""
        tensors = {f"master/{name}": master for name, master in self.masters.items()}
        tensors |= {f"best/{name}": master for name, master in (self.best or {}).items()}
        for flat in self._flats.values():
            state = self.optimiser.state[flat.vector]
            for key in _MOMENTS:
                tensors |= {f"{key}/{name}": part for name, part in flat.named(state[key]).items()}
        whole = torch.contiguous_format
        with atomic_path(folder) as fresh:
            fresh.mkdir()
            save_file(
                {name: tensor.clone(memory_format=whole) for name, tensor in tensors.items()},
                fresh / "state.safetensors",
            )
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
        trained = [name for flat in self._flats.values() for name in flat.named(flat.vector)]
        moments = {key: self._part(tensors, key, trained) for key in _MOMENTS}
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self.best = best
        self._write()
        for flat in self._flats.values():
            state = {key: torch.zeros_like(flat.vector) for key in _MOMENTS}
            for key, vector in state.items():
                for name, part in flat.named(vector).items():
                    part.copy_(moments[key][name])
            taken = torch.tensor(float(len(history)), device=device)
            self.optimiser.state[flat.vector] = {"step": taken, **state}
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
