"""Parts of a causal LM replaced by faster ones while a context lasts, where these give the same.

What can be replaced is found by structure and tried on random input, so that an architecture that
only looks alike keeps its own code.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tclora.model.kernels.attention import row_attention
from tclora.model.kernels.gate import silu_gate
from tclora.model.kernels.norm import rms_norm
from tclora.model.kernels.rotary import apply_rotary

ROW_ATTENTION = "tclora_rows"  # name among transformers' attention functions
_ROTARY = "apply_rotary_pos_emb"  # of a modeling module of transformers
_Forward = Callable[[Tensor], Tensor]


class Substitute(NamedTuple):
    """A function that takes the place of another: attribute `name` of `owner`."""

    owner: Any
    name: str
    function: Callable[..., Any]


def find_substitutes(model: PreTrainedModel) -> list[Substitute]:
    """Try which parts of a model have faster ones that give the same."""
    found = [(module, _substitute(module)) for module in model.modules()]
    modelings = (sys.modules[name] for name in sorted(_modeling_modules(model)))
    return [
        *(Substitute(module, "forward", forward) for module, forward in found if forward),
        *(Substitute(modeling, _ROTARY, apply_rotary) for modeling in modelings),
    ]


@contextmanager
def substituted(model: PreTrainedModel, substitutes: Sequence[Substitute]) -> Iterator[None]:
    """Compute with faster parts while the context lasts, backward passes included.

    Attention reads rows that stand behind each other; their lengths are the argument
    ``row_lengths`` of the model's forward.
    """
    before = model.config._attn_implementation
    with ExitStack() as stack:
        for owner, name, function in substitutes:
            stack.enter_context(_attribute(owner, name, function))
        model.set_attn_implementation(ROW_ATTENTION)
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attend within the rows of one sequence; the form is transformers'."""
    unknown = sorted(name for name in _CHANGING if given.get(name) is not None)
    if dropout or attention_mask is not None or unknown or len(query) != 1:
        raise NotImplementedError(f"attention with {unknown or 'dropout, a mask or a batch'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    attended = row_attention(query[0], key[0], value[0], row_lengths, scale)
    return attended[None], None


_CHANGING = ("softcap", "s_aux", "position_bias", "cache")  # arguments that change the scores
AttentionInterface.register(ROW_ATTENTION, _attend)


def _substitute(module: nn.Module) -> _Forward | None:
    for make in (_norm, _gated):
        found = make(module)
        if found is not None and _same(module, *found):
            return found[0]
    return None


def _norm(module: nn.Module) -> tuple[_Forward, Tensor] | None:
    """Return a forward for an RMSNorm, and the weight that says what it reads."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    return lambda x: rms_norm(x, weight, eps), weight


def _gated(module: nn.Module) -> tuple[_Forward, Tensor] | None:
    """Return a forward for a SwiGLU layer, and the weight that says what it reads."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    gate, up, down = parts
    if not gate.weight.is_floating_point():  # type: ignore[union-attr]
        return None  # of packed weights neither width nor type can be read off
    return lambda x: down(silu_gate(gate(x), up(x))), gate.weight  # type: ignore[misc,union-attr]


@torch.no_grad()
def _same(module: nn.Module, forward: _Forward, weight: Tensor) -> bool:
    """Try a forward on random rows; the last dimension of the weight is that of its input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    wanted, found = module(x), forward(x)
    error, size = (found - wanted).float().norm(), wanted.float().norm()
    return bool(error <= 8 * torch.finfo(weight.dtype).eps * size)


def _modeling_modules(model: PreTrainedModel) -> set[str]:
    """Return the modules of transformers whose rotary embeddings are the usual ones."""
    named = {type(module).__module__ for module in model.modules()}
    return {name for name in named if _usual_rotary(getattr(sys.modules[name], _ROTARY, None))}


def _usual_rotary(function: Callable[..., Any] | None) -> bool:
    if function is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    angle = torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2)
    given = (q, k, angle.cos(), angle.sin())
    try:
        wanted = function(*given)
    except (TypeError, RuntimeError):  # of another form
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
        for a, b in zip(apply_rotary(*given), wanted, strict=True)
    )


@contextmanager
def _attribute(place: Any, name: str, value: Any) -> Iterator[None]:  # noqa: ANN401
    """Set an attribute of its own while the context lasts."""
    own = vars(place)
    before = own.get(name)
    known = name in own
    setattr(place, name, value)
    try:
        yield
    finally:
        if known:
            setattr(place, name, before)
        else:
            delattr(place, name)
