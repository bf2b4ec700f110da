"""Gates in a running model: forward hooks on PEFT's LoRA layers, one gate per row of a batch.

Symbols: n rows in a batch, T tokens, K clusters, R components of a module.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from tclora.errors import AdapterError
from tclora.route.fused import Gate, fuse
from tclora.route.gates import GatedAdapter

_PREFIX = "base_model.model."


class Gating:
    """Multiplies the components A x of a loaded LoRA adapter by gates.

    Outside of a context every gate is 1: the model is the static merge that stock PEFT loads. A
    backward pass that recomputes activations (gradient checkpointing) must be inside the context
    too. A model has one set of gates at a time: a second thread waits until the first has left its
    context.

    Parameters
    ----------
    model : PeftModel
        A model with the gated adapter loaded; its LoRA layers get forward hooks on `lora_A` and,
        for passes without gradients, a shorter forward pass (`fuse`).
    gated : GatedAdapter
        Its gates.
    adapter : str
        PEFT's name of the loaded adapter.

    Raises
    ------
    AdapterError
        If the loaded adapter does not have exactly the modules and ranks of the gates.
    """

    def __init__(self, model: PeftModel, gated: GatedAdapter, adapter: str = "default") -> None:
        lora = _layers(model, adapter)
        layers = {name: cast("nn.Linear", layer.lora_A[adapter]) for name, layer in lora.items()}
        ranks = {name: gate.shape[1] for name, gate in gated.gates.items()}
        found = {name: layer.out_features for name, layer in layers.items()}
        if found != ranks:
            odd = sorted(name for name in found | ranks if found.get(name) != ranks.get(name))
            raise AdapterError(
                f"the loaded adapter must have the modules and ranks of its gates, but differs in "
                f"{len(odd)}, such as {odd[0]}; is this the base model it was made for?"
            )
        weight = next(iter(layers.values())).weight
        self._gated = gated
        self._lock = threading.RLock()
        self._prototypes: dict[str, Tensor] = {}
        self._devices = {name: layer.weight.device for name, layer in layers.items()}
        self._names = list(layers)
        self._widths = [ranks[name] for name in self._names]
        self._stacked = torch.cat([gated.gates[name] for name in self._names], dim=1).to(
            weight.device, torch.float32
        )  # (K, Σ R)
        self._dtype = weight.dtype
        self._current: dict[str, Gate] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(self._hook(name))
            whole = lora[name]
            if isinstance(whole, Linear):
                fuse(whole, adapter, partial(self._gate, name))

    @contextmanager
    def applied(self, weights: Tensor, known: Tensor | None = None) -> Iterator[None]:
        """Gate each row of every batch by its own mixture while the context lasts.

        Parameters
        ----------
        weights : Tensor, shape (n, K)
            Routing weights of the batch's rows; n = 1 serves all rows of any batch. A batch of a
            multiple of n rows (beams, several samples per prompt) repeats each row's gate.
        known : Tensor of bool, shape (n,), optional
            Rows that are routed; the others get the static merge.
        """
        pi = weights.to(self._stacked)
        gates = pi @ self._stacked  # (n, Σ R)
        if known is not None:
            gates = torch.where(known.to(gates.device)[:, None], gates, 1.0)
        parts = gates.to(self._dtype)[:, None].split(self._widths, dim=2)  # (n, 1, R) each
        with self._use(
            {
                name: _by_row(part.to(self._devices[name]))
                for name, part in zip(self._names, parts, strict=True)
            }
        ):
            yield

    @contextmanager
    def applied_per_token(
        self, *, temperature: float = 1.0, top_k: int | None = None, known: Tensor | None = None
    ) -> Iterator[None]:
        """Gate every token in every module by itself, as Arrow routes, in the factor space.

        Parameters
        ----------
        temperature : float
            Temperature of the softmax over clusters.
        top_k : int, optional
            Clusters mixed per token; all by default.
        known : Tensor of bool, shape (n,), optional
            Rows that are routed, as in `applied`; the others get the static merge.

        Raises
        ------
        ValueError
            If temperature or top_k is not positive.

        Notes
        -----
        A cluster's prototype in a module is the first right singular vector v_k of its update
        B diag(g_k) A. It lies in the row space of A, v_k = Aᵀ a_k, so that |v_kᵀ x| = |a_kᵀ (A x)|
        costs K R per token beside the components themselves.

        References
        ----------
        Ostapenko et al. (2024), "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
        arXiv 2405.11157 (Arrow).
        """
        if not temperature > 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"temperature must be above 0 and top_k at least 1, got {temperature}, {top_k}"
            )
        gates = {}
        for name, device in self._devices.items():
            if name not in self._prototypes:
                self._prototypes[name] = _prototypes(self._gated, name).to(device, self._dtype)
            own = self._gated.gates[name].to(device, self._dtype)
            gate = _by_token(self._prototypes[name], own, temperature, top_k)
            gates[name] = gate if known is None else _where(known.to(device), gate)
        with self._use(gates):
            yield

    @contextmanager
    def _use(self, gates: dict[str, Gate]) -> Iterator[None]:
        with self._lock:
            before, self._current = self._current, gates
            try:
                yield
            finally:
                self._current = before

    def _gate(self, name: str) -> Gate | None:
        return self._current.get(name)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def gate(_: nn.Module, __: tuple[Tensor, ...], components: Tensor) -> Tensor | None:
            apply = self._gate(name)
            return apply(components) if apply else None

        return gate


def _layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers of an adapter by module path, in sorted order."""
    found = {
        path.removeprefix(_PREFIX): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
    return dict(sorted(found.items()))


def _by_row(gate: Tensor) -> Gate:
    rows = gate.shape[0]

    def apply(components: Tensor) -> Tensor:
        if rows == 1:
            return components * (gate if components.ndim == 3 else gate[0])
        if components.ndim != 3 or components.shape[0] % rows:
            raise ValueError(
                f"a batch must have a multiple of the {rows} routed rows, got components of shape "
                f"{tuple(components.shape)}"
            )
        repeats = components.shape[0] // rows
        return components * (gate if repeats == 1 else gate.repeat_interleave(repeats, dim=0))

    return apply


def _by_token(prototypes: Tensor, own: Tensor, temperature: float, top_k: int | None) -> Gate:
    def apply(components: Tensor) -> Tensor:
        logits = (components @ prototypes.mT).abs().float() / temperature  # (n, T, K)
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return components * (logits.softmax(-1).to(own.dtype) @ own)

    return apply


def _where(known: Tensor, gate: Gate) -> Gate:
    """Gate the rows that are known."""

    def apply(components: Tensor) -> Tensor:
        if components.ndim != 3 or components.shape[0] % len(known):
            raise ValueError(
                f"a batch must have a multiple of the {len(known)} routed rows, got components of "
                f"shape {tuple(components.shape)}"
            )
        rows = known.repeat_interleave(components.shape[0] // len(known))
        return torch.where(rows[:, None, None], gate(components), components)

    return apply


def _prototypes(gated: GatedAdapter, module: str) -> Tensor:
    """Return a_k for every cluster, shape (K, R); a gauge of A with orthonormal rows is implied."""
    B, A = (factor.double() for factor in gated.adapter.modules[module])
    _, upper = torch.linalg.qr(A.mT, mode="r")  # Aᵀ = Q upper
    rows = []
    for gate in gated.gates[module].double():
        _, _, Vh = torch.linalg.svd((B * gate) @ upper.mT, full_matrices=False)
        # Q v = Aᵀ a with upper a = v; a redundant component makes upper singular.
        rows.append(torch.linalg.pinv(upper) @ Vh[0])
    return torch.stack(rows)
