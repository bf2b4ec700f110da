"""LoRA layers for parts whose rows belong to several adapters.

Shapes: N tokens of all rows; x (..., d_in) of N tokens; A (r, d_in); B (d_out, r). Rows of one
adapter stand next to each other, so that its part is a slice with a product of its own: as many
operations as one adapter would take for all rows, however many there are. On CPU that is faster
than one product with all factors stacked and other adapters' components masked out, and than
batched products over factors gathered per row (``benchmarks/mixed_lora.py``); and a value that is
not finite stays with its adapter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.errors import ModelError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of

Spans = list[tuple[int, int]]  # first and last + 1 of tokens
Factors = Sequence[tuple[nn.Parameter, nn.Parameter]]
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class MixedLora:
    """Several adapters placed in one model; each row of a part passes through its own.

    Parameters
    ----------
    model : PreTrainedModel
        The base, whose weights are frozen; its modules compute the updates too from here on.
    weights : sequence of Mapping[str, Parameter]
        Per adapter: PEFT's name → weight. Adapters may share an A that is not trained.
    scaling : float
        Factor of B A x.
    dropout : float
        Probability; applied to x.

    Attributes
    ----------
    modules : list of str
        Paths of the modules that are updated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Sequence[Mapping[str, nn.Parameter]],
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> None:
        self.modules = [module_of(name) for name in weights[0] if name.endswith(A_WEIGHT)]
        self._owners: list[int] = []
        self._lengths: list[int] | None = None
        self._scaling, self._dropout = scaling, dropout
        for name in weights[0]:
            if name.endswith(A_WEIGHT):
                factors = [(w[name], w[name.removesuffix(A_WEIGHT) + B_WEIGHT]) for w in weights]
                self._place(model, module_of(name), factors)

    @contextmanager
    def rows(self, owners: Sequence[int], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Say whose rows pass through the model while the context lasts, backward pass included.

        Parameters
        ----------
        owners : sequence of int
            Adapter of every row, those of one adapter next to each other. Outside of such a context
            the model is the base.
        lengths : sequence of int, optional
            Positions of every row; by default all have the same number.
        """
        self._owners = list(owners)
        self._lengths = None if lengths is None else list(lengths)
        try:
            yield
        finally:
            self._owners = []

    def _place(self, model: PreTrainedModel, path: str, factors: Factors) -> None:
        module = model.get_submodule(path)
        if type(module) is nn.Linear and not self._dropout:
            own = self._linear(module, path, factors)
            module.forward = own  # type: ignore[method-assign,assignment]
        else:
            module.register_forward_hook(self._hook(path, factors))

    def _linear(self, module: nn.Linear, path: str, factors: Factors) -> Callable[[Tensor], Tensor]:
        """Return a forward that computes a linear layer and its updates at once."""

        def forward(x: Tensor) -> Tensor:
            if not self._owners:
                return nn.functional.linear(x, module.weight, module.bias)
            chosen = self._chosen(path, x, factors)
            updated: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                x, module.weight, module.bias, self._scaling, chosen.spans, *chosen.factors
            )
            return updated

        return forward

    def _hook(self, path: str, factors: Factors) -> Hook:
        """Return a hook that adds the updates to what any other module has computed."""

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._owners:
                return output
            x = inputs[0]
            chosen = self._chosen(path, x, factors)
            if self._dropout:
                x = nn.functional.dropout(x, self._dropout)
            if output._base is not None:  # a view cannot be added to in place
                output = output.clone()
            updated: Tensor = _Update.apply(  # type: ignore[no-untyped-call]
                output, x, self._scaling, chosen.spans, *chosen.factors
            )
            return updated

        return add

    def _chosen(self, path: str, x: Tensor, factors: Factors) -> "_Chosen":
        """Return the factors of the adapters in the part, and which tokens are theirs."""
        lengths = self._row_lengths(path, x)
        spans, own, start = [], [], 0
        for owner, group in groupby(
            zip(self._owners, lengths, strict=True), key=lambda row: row[0]
        ):
            end = start + sum(length for _, length in group)
            spans.append((start, end))
            own.append(owner)
            start = end
        As, a_spans = [factors[k][0] for k in own], spans
        if all(A is As[0] for A in As):
            As, a_spans = As[:1], [(0, start)]
        return _Chosen((a_spans, spans), (*As, *(factors[k][1] for k in own)))

    def _row_lengths(self, path: str, x: Tensor) -> list[int]:
        tokens, rows = x.shape[:-1].numel(), len(self._owners)
        if self._lengths is None and x.dim() > 2 and x.shape[0] == rows:
            return [tokens // rows] * rows
        if self._lengths is not None and sum(self._lengths) == tokens:
            return self._lengths
        raise ModelError(
            f"input of {path} must hold every token of {rows} rows, got {tuple(x.shape)}; choose "
            "other train.target_modules"
        )


class _Chosen(NamedTuple):
    spans: tuple[Spans, Spans]  # of the A, and of the B
    factors: tuple[Tensor, ...]  # all A, then all B


def _add_update(
    out: Tensor, flat: Tensor, scaling: float, spans: tuple[Spans, Spans], factors: Sequence[Tensor]
) -> Tensor:
    """Add s B_k A_k x to each adapter's slice of the output, (N, d_out); return A x, (N, r)."""
    a_spans, b_spans = spans
    As, Bs = factors[: len(a_spans)], factors[len(a_spans) :]
    h = flat.new_empty(len(flat), len(As[0]))
    for (start, end), A in zip(a_spans, As, strict=True):
        torch.mm(flat[start:end], A.mT, out=h[start:end])
    for (start, end), B in zip(b_spans, Bs, strict=True):
        out[start:end].addmm_(h[start:end], B.mT, alpha=scaling)
    return h


def _factor_gradients(
    dy: Tensor,
    flat: Tensor,
    h: Tensor,
    scaling: float,
    spans: tuple[Spans, Spans],
    factors: Sequence[Tensor],
    dx: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of all A and B; add the update's part to that of x, if there is one."""
    a_spans, b_spans = spans
    As, Bs = factors[: len(a_spans)], factors[len(a_spans) :]
    dh = torch.empty_like(h)
    dBs: list[Tensor | None] = []
    for (start, end), B in zip(b_spans, Bs, strict=True):
        torch.mm(dy[start:end], B, out=dh[start:end])
        dBs.append((h[start:end].mT @ dy[start:end]).mT.contiguous().mul_(scaling))
    dh.mul_(scaling)
    dAs: list[Tensor | None] = []
    for (start, end), A in zip(a_spans, As, strict=True):
        dAs.append(dh[start:end].mT @ flat[start:end] if A.requires_grad else None)
        if dx is not None:
            dx[start:end].addmm_(dh[start:end], A)
    return [*dAs, *dBs]


class _Linear(torch.autograd.Function):
    """A frozen linear layer with the updates of several adapters."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        spans: tuple[Spans, Spans],
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, d_in)
        out = nn.functional.linear(flat, weight, bias)  # (N, d_out)
        h = _add_update(out, flat, scaling, spans, factors)
        ctx.save_for_backward(flat, h, weight, *factors)
        ctx.scaling, ctx.spans, ctx.shape = scaling, spans, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat, h, weight, *factors = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (N, d_out)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        found = _factor_gradients(dy, flat, h, ctx.scaling, ctx.spans, factors, dx)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *found


class _Update(torch.autograd.Function):
    """The updates of several adapters, added in place to what a module has computed."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        x: Tensor,
        scaling: float,
        spans: tuple[Spans, Spans],
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, d_in)
        h = _add_update(output.view(-1, output.shape[-1]), flat, scaling, spans, factors)
        ctx.save_for_backward(flat, h, *factors)
        ctx.scaling, ctx.spans, ctx.shape = scaling, spans, x.shape
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat, h, *factors = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (N, d_out)
        dx = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        found = _factor_gradients(dy, flat, h, ctx.scaling, ctx.spans, factors, dx)
        return grads[0], None if dx is None else dx.view(ctx.shape), None, None, *found
