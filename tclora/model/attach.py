"""A LoRA adapter attached to a plain model for a while, its components gated."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.adapter import Adapter, LoraFactors


@contextmanager
def attached(
    model: PreTrainedModel, adapter: Adapter | None, gates: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Add B diag(gate) A x to the output of every module while the context lasts.

    Parameters
    ----------
    model : PreTrainedModel
        The base model.
    adapter : Adapter or None
        What to attach; None attaches nothing.
    gates : Mapping[str, Tensor], optional
        Module path → factors of its components, shape (R,) or any that broadcasts against the
        components (rows, tokens, R), on any device; 1 by default.
    """
    handles = [
        model.get_submodule(module).register_forward_hook(
            _hook(model, factors, None if gates is None else gates[module])
        )
        for module, factors in (adapter.modules.items() if adapter else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    model: PreTrainedModel, factors: LoraFactors, gate: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    B, A = (factor.to(model.device, model.dtype) for factor in factors)
    moved = None if gate is None else gate.to(model.device, model.dtype)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = inputs[0] @ A.mT
        return output + (inner if moved is None else inner * moved) @ B.mT

    return add
