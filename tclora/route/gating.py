"""Gates in a running model: forward hooks on PEFT's LoRA layers, one gate per row of a batch.

Symbols: n rows in a batch, T tokens, K clusters, R components of a module.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from tclora.adapter import LoraFactors
from tclora.adapter.peft import MODULE_PREFIX
from tclora.errors import AdapterError
from tclora.route.fused import Gate, fuse
from tclora.route.gates import GatedAdapter


class Gating:
    """Multiplies the components V x of a loaded LoRA adapter by gates.

    The layers hold unit components from now on. Outside of a context the static gate is in force:
    the model is the static merge that stock PEFT loads. Gates belong to the thread that enters the
    context; others run meanwhile with theirs. A backward pass that recomputes activations
    (gradient checkpointing) must be inside the context too.

    Parameters
    ----------
    model : PeftModel
        A model with the gated adapter loaded; its LoRA layers get the unit components as weights,
        forward hooks on `lora_A` and, for passes without gradients, a shorter forward pass
        (`fuse`). What would take these weights for an update, PEFT's ``merge_adapter`` and
        ``save_pretrained``, raises `AdapterError`. It may be cast or moved to a device later.
    gated : GatedAdapter
        Its gates.
    adapter : str
        PEFT's name of the loaded adapter.

    Raises
    ------
    AdapterError
        If the loaded adapter does not have exactly the modules and ranks of the gates, or is merged
        into the base weights.
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
        if any(layer.merged for layer in lora.values()):
            raise AdapterError(
                "the loaded adapter must not be merged into the base weights; call unmerge_adapter"
            )
        self._gated = gated
        self._layers = layers
        self._widths = [ranks[name] for name in layers]
        self._stacked = torch.cat([gated.gates[name] for name in layers], dim=1).float()  # (K, Σ R)
        self._fallback = torch.cat([gated.elsewhere(name) for name in layers]).float()[None]
        static = torch.cat([gated.static(name) for name in layers]).float()[None]  # (1, Σ R)
        self._prototypes: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._current: dict[int, dict[str, Gate]] = {}  # by thread
        self._resting = self._by_row(static)
        for name, layer in lora.items():
            _set_components(layer, adapter, gated.components(name))
            layers[name].register_forward_hook(self._hook(name))
            layer.merge = _refuse  # type: ignore[method-assign]
            if isinstance(layer, Linear):
                fuse(layer, adapter, partial(self._gate, name))
        model.save_pretrained = _refuse  # type: ignore[method-assign]

    @contextmanager
    def applied(self, weights: Tensor, belonging: Tensor | None = None) -> Iterator[None]:
        """Gate each row of every batch by its own mixture while the context lasts.

        Parameters
        ----------
        weights : Tensor, shape (n, K)
            Routing weights of the batch's rows; n = 1 serves all rows of any batch. A batch of a
            multiple of n rows (beams, several samples per prompt) repeats each row's gate.
        belonging : Tensor, shape (n,), optional
            Share of the clusters' gates in each row's (0–1), the fallback gate being the rest; all
            1 by default.

        Raises
        ------
        ValueError
            If a weight is not finite.
        """
        if not weights.isfinite().all():
            raise ValueError("weights must be finite, got NaN or infinity; check the router")
        gates = weights.to(self._stacked) @ self._stacked  # (n, Σ R)
        if belonging is not None:
            gates = torch.lerp(self._fallback, gates, belonging.to(gates)[:, None])
        with self._use(self._by_row(gates)):
            yield

    @contextmanager
    def applied_per_token(
        self, *, temperature: float = 1.0, top_k: int | None = None, belonging: Tensor | None = None
    ) -> Iterator[None]:
        """Gate every token in every module by itself, as Arrow routes, in the factor space.

        Parameters
        ----------
        temperature : float
            Temperature of the softmax over clusters.
        top_k : int, optional
            Clusters mixed per token; all by default.
        belonging : Tensor, shape (n,), optional
            As in `applied`.

        Raises
        ------
        ValueError
            If temperature or top_k is not positive.

        Notes
        -----
        A cluster's prototype in a module is the first right singular vector v_k of its update
        U diag(g_k) V. It lies in the row space of V, v_k = Vᵀ a_k, so that |v_kᵀ x| = |a_kᵀ (V x)|
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
        fallback = self._by_row(self._fallback)
        for name, layer in self._layers.items():
            if name not in self._prototypes:
                self._prototypes[name] = _prototypes(self._gated, name)
            prototypes = self._prototypes[name].to(layer.weight)
            own = self._gated.gates[name].to(layer.weight)
            gate = _by_token(prototypes, own, temperature, top_k)
            gates[name] = gate if belonging is None else _blend(belonging, gate, fallback[name])
        with self._use(gates):
            yield

    def _by_row(self, gates: Tensor) -> dict[str, Gate]:
        """Split gates (n, Σ R) into one for every layer, of its type and on its device."""
        parts = torch.split(gates[:, None], self._widths, dim=2)  # (n, 1, R) each
        return {
            name: _by_row(part.to(layer.weight))
            for (name, layer), part in zip(self._layers.items(), parts, strict=True)
        }

    @contextmanager
    def _use(self, gates: dict[str, Gate]) -> Iterator[None]:
        thread = threading.get_ident()
        before = self._current.get(thread)
        with self._lock:
            self._current[thread] = gates
        try:
            yield
        finally:
            with self._lock:
                if before is None:
                    del self._current[thread]
                else:
                    self._current[thread] = before

    def _gate(self, name: str) -> Gate:
        gates = self._current.get(threading.get_ident())
        if gates is None:
            gates = self._of_autograd() or self._resting
        return gates[name]

    def _of_autograd(self) -> dict[str, Gate] | None:
        """Return the gates of a recomputation that autograd runs in a thread of its own."""
        if not isinstance(threading.current_thread(), threading._DummyThread):
            return None  # started by Python, and in no context
        with self._lock:
            active = list(self._current.values())
        if len(active) > 1:
            raise RuntimeError(
                "gradient checkpointing must not run in several gated threads at once; "
                "turn it off or take turns"
            )
        return active[0] if active else None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def gate(_: nn.Module, __: tuple[Tensor, ...], components: Tensor) -> Tensor:
            return self._gate(name)(components)

        return gate


def _refuse(*_: object, **__: object) -> NoReturn:
    raise AdapterError(
        "a gated adapter must stay apart from the base weights and in its library, as its layers "
        "hold unit components; write a plain adapter with to_peft and load that one instead"
    )


@torch.no_grad()
def _set_components(layer: LoraLayer, adapter: str, unit: LoraFactors) -> None:
    for part, factor in ((layer.lora_B, unit.B), (layer.lora_A, unit.A)):
        cast("nn.Linear", part[adapter]).weight.copy_(factor)


def _layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers of an adapter by module path, in sorted order."""
    found = {
        path.removeprefix(MODULE_PREFIX): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
    return dict(sorted(found.items()))


def _by_row(gate: Tensor) -> Gate:
    rows = gate.shape[0]

    def apply(components: Tensor) -> Tensor:
        own = gate.to(components)  # the model may have been cast or moved since
        if rows == 1:
            return components * (own if components.ndim == 3 else own[0])
        if components.ndim != 3 or components.shape[0] % rows:
            raise ValueError(
                f"a batch must have a multiple of the {rows} routed rows, got components of shape "
                f"{tuple(components.shape)}"
            )
        repeats = components.shape[0] // rows
        return components * (own if repeats == 1 else own.repeat_interleave(repeats, dim=0))

    return apply


def _by_token(prototypes: Tensor, own: Tensor, temperature: float, top_k: int | None) -> Gate:
    def apply(components: Tensor) -> Tensor:
        logits = (
            components @ prototypes.to(components).mT
        ).abs().float() / temperature  # (n, T, K)
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return components * (logits.softmax(-1).to(components) @ own.to(components))

    return apply


def _blend(belonging: Tensor, gate: Gate, fallback: Gate) -> Gate:
    """Gate every row partly by one gate, for the rest by another."""

    def apply(components: Tensor) -> Tensor:
        if components.ndim != 3 or components.shape[0] % len(belonging):
            raise ValueError(
                f"a batch must have a multiple of the {len(belonging)} routed rows, got components "
                f"of shape {tuple(components.shape)}"
            )
        shares = belonging.to(components).repeat_interleave(components.shape[0] // len(belonging))
        return torch.lerp(fallback(components), gate(components), shares[:, None, None])

    return apply


def _prototypes(gated: GatedAdapter, module: str) -> Tensor:
    """Return a_k for every cluster, shape (K, R); a gauge of V with orthonormal rows is implied."""
    U, V = gated.components(module)
    _, upper = torch.linalg.qr(V.mT, mode="r")  # Vᵀ = Q upper
    rows = []
    for gate in gated.gates[module].double():
        _, _, Vh = torch.linalg.svd((U * gate) @ upper.mT, full_matrices=False)
        # Q v = Vᵀ a with upper a = v; a redundant component makes upper singular.
        rows.append(torch.linalg.pinv(upper) @ Vh[0])
    return torch.stack(rows)
