"""Gradient sketches: which way each row would push an adapter that starts at zero.

With B = 0 the loss of a row has the gradient G_m = Σ_t g_t (A x_t)ᵀ with respect to B of module m,
where x_t is what the module reads at token t and g_t the gradient of the loss with respect to what
it gives out. A random projection Ω_m (S, d_out) of unit variance per entry of G_m keeps inner
products in expectation (Johnson and Lindenstrauss), so rows whose sketches Ω_m G_m are close pull
an adapter the same way. No gradient of a weight is ever formed: a backward pass over a batch gives
the sketches of all its rows.

Symbols: N rows, M modules, S width of the projection, r LoRA rank.

References
----------
.. [1] Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024
   (random projections of LoRA gradients per row).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tclora.cluster.features.request import FeatureRequest, Features, unit_rows
from tclora.errors import ModelError
from tclora.jobs.call import EventCallback
from tclora.model.kernels.attention import with_sound_gradients
from tclora.model.loss import response_nll
from tclora.model.tokens import IGNORED, Batch, batches
from tclora.train.lora import A_WEIGHT, fresh_weights, module_of

WIDTH = 4  # S


def gradient_sketches(request: FeatureRequest, on_event: EventCallback) -> Features:
    """Return the sketch of each row's gradient with respect to all B, of unit norm.

    Returns
    -------
    ndarray of float32, shape (N, M S r)
    """
    loaded = request.base.load()
    rows = loaded.encode(request.frame())
    sketcher = Sketcher(loaded.model, projections(loaded.model, request))
    sketches = np.zeros((len(rows), sketcher.width), dtype=np.float32)
    budget, done = request.adapter.tokens_at_once(), 0
    for batch in batches(rows, pad_id=loaded.pad_id, token_budget=budget):
        sketches[list(batch.rows)] = sketcher.sketch(batch)
        done += len(batch.rows)
        on_event({"done": done, "of": len(rows)})
    return unit_rows(sketches)


def projections(
    model: PreTrainedModel, request: FeatureRequest
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module → A_0 (r, d_in) of an adapter and Ω (S, d_out), single precision.

    Raises
    ------
    ModelError
        If a module that adapters are trained on is not a linear layer.
    """
    weights = fresh_weights(model, request.adapter, request.seed)
    generator = torch.Generator().manual_seed(request.seed)
    found = {}
    for name in sorted(weights):
        if name.endswith(A_WEIGHT):
            module = module_of(name)
            layer = model.get_submodule(module)
            if not isinstance(layer, nn.Linear):
                raise ModelError(
                    f"train.target_modules must be linear layers with cluster.method: gradients, "
                    f"got {module!r}, a {type(layer).__name__}; name others, or take another "
                    "cluster.method, such as hidden-states"
                )
            omega = torch.randn(WIDTH, layer.out_features, generator=generator) / WIDTH**0.5
            found[module] = (weights[name].detach().float(), omega.to(model.device))
    return found


class Sketcher:
    """A model whose adapted modules tell the sketches of the rows of a batch.

    Parameters
    ----------
    model : PreTrainedModel
        Without adapters; its weights stay as they are.
    projections : Mapping[str, tuple of Tensor]
        Module → (A, Ω).
    """

    def __init__(
        self, model: PreTrainedModel, projections: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        self._model = model
        self._projections = projections
        self._found: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Numbers per row."""
        return sum(len(A) * len(omega) for A, omega in self._projections.values())

    def sketch(self, batch: Batch) -> Features:
        """Return the sketches of a batch's rows, each of the mean loss of its own response."""
        with self._watched(), with_sound_gradients():
            losses = response_nll(self._model, batch)  # (rows, S)
            counts = (batch.labels != IGNORED).sum(1).to(losses.device)
            (losses.sum(1) / counts).sum().backward()
        parts = [self._found[module].flatten(1) for module in self._projections]
        self._found = {}
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy(), dtype=np.float32)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Let gradients flow, past weights that need none, to every watched module."""
        handles = [
            self._model.get_submodule(module).register_forward_hook(self._hook(module))
            for module in self._projections
        ]
        trainable = [w for w in self._model.parameters() if w.requires_grad]
        for weight in trainable:
            weight.requires_grad_(False)
        handles.append(self._start())
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight in trainable:
                weight.requires_grad_(True)

    def _start(self) -> RemovableHandle:
        def begin(_: nn.Module, __: object, output: Tensor) -> None:
            output.requires_grad_(True)

        return self._model.get_input_embeddings().register_forward_hook(begin)

    def _hook(self, module: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        A, omega = self._projections[module]

        def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            inner = inputs[0].detach().float() @ A.mT  # (rows, T, r)

            def keep(gradient: Tensor) -> None:
                pushed = gradient.float() @ omega.mT  # (rows, T, S)
                self._found[module] = torch.einsum("nts,ntr->nsr", pushed, inner)

            output.register_hook(keep)

        return watch
