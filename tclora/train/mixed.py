"""LoRA layers for batches whose rows belong to several adapters.

Shapes: n rows of T tokens, N = n T; x (n, T, d_in); A (r, d_in); B (d_out, r). Rows of one adapter
stand next to each other in a batch, so that its part is a slice with a product of its own: as many
operations as one adapter would take for all rows, however many there are. On CPU that is faster
than one product with all factors stacked and other adapters' components masked out, and than
batched products over factors gathered per row (``benchmarks/mixed_lora.py``); and a value that is
not finite stays with its adapter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.errors import ModelError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of

Spans = list[tuple[int, int]]  # first and last + 1 of rows or tokens
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class MixedLora:
    """Several adapters placed in one model; each row of a batch passes through its own.

    Parameters
    ----------
    model : PreTrainedModel
        The base; its modules get forward hooks.
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
        self._scaling, self._dropout = scaling, dropout
        for name in weights[0]:
            if name.endswith(A_WEIGHT):
                factors = [(w[name], w[name.removesuffix(A_WEIGHT) + B_WEIGHT]) for w in weights]
                module = module_of(name)
                model.get_submodule(module).register_forward_hook(self._hook(module, factors))

    @contextmanager
    def rows(self, owners: Sequence[int]) -> Iterator[None]:
        """Say whose rows the batch holds while the context lasts, its backward pass included.

        Parameters
        ----------
        owners : sequence of int
            Adapter of every row, those of one adapter next to each other. Outside of such a context
            the model is the base.
        """
        self._owners = list(owners)
        try:
            yield
        finally:
            self._owners = []

    def _hook(self, module: str, factors: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> Hook:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._owners:
                return output
            x = inputs[0]
            _check_rows(module, x, len(self._owners))
            tokens = x.shape[:-1].numel() // len(self._owners)  # per row
            spans, own = _spans(self._owners, tokens)
            Bs = [factors[k][1] for k in own]
            As, a_spans = [factors[k][0] for k in own], spans
            if all(A is As[0] for A in As):
                As, a_spans = As[:1], [(0, spans[-1][1])]
            if self._dropout:
                x = nn.functional.dropout(x, self._dropout)
            if output._base is not None:  # a view cannot be added to in place
                output = output.clone()
            updated: Tensor = _Update.apply(  # type: ignore[no-untyped-call]
                output, x, self._scaling, a_spans, spans, *As, *Bs
            )
            return updated

        return add


def _check_rows(module: str, x: Tensor, rows: int) -> None:
    if x.dim() < 3 or x.shape[0] != rows:
        raise ModelError(
            f"input of {module} must be (rows, tokens, width) for train.engine 'together', got "
            f"{tuple(x.shape)} for {rows} rows; choose other train.target_modules or "
            "train.engine=separate"
        )


def _spans(owners: Sequence[int], tokens: int) -> tuple[Spans, list[int]]:
    """Return the slices of adjacent tokens with one owner, and these owners."""
    spans, own, start = [], [], 0
    for owner, group in groupby(owners):
        end = start + tokens * len(list(group))
        spans.append((start, end))
        own.append(owner)
        start = end
    return spans, own


class _Update(torch.autograd.Function):
    """Add s B_k A_k x to the output in place, for each adapter's slice of the tokens."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        x: Tensor,
        scaling: float,
        a_spans: Spans,
        b_spans: Spans,
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, d_in)
        out = output.view(-1, output.shape[-1])  # (N, d_out)
        As, Bs = factors[: len(a_spans)], factors[len(a_spans) :]
        h = flat.new_empty(flat.shape[0], As[0].shape[0])  # (N, r)
        for (start, end), A in zip(a_spans, As, strict=True):
            torch.mm(flat[start:end], A.mT, out=h[start:end])
        for (start, end), B in zip(b_spans, Bs, strict=True):
            out[start:end].addmm_(h[start:end], B.mT, alpha=scaling)
        ctx.save_for_backward(flat, h, *factors)
        ctx.scaling, ctx.spans, ctx.shape = scaling, (a_spans, b_spans), x.shape
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat, h, *factors = ctx.saved_tensors
        a_spans, b_spans = ctx.spans
        As, Bs = factors[: len(a_spans)], factors[len(a_spans) :]
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (N, d_out)
        dh, dBs = torch.empty_like(h), []
        for (start, end), B in zip(b_spans, Bs, strict=True):
            torch.mm(dy[start:end], B, out=dh[start:end])
            dBs.append((dy[start:end].mT @ h[start:end]).mul_(ctx.scaling))
        dh.mul_(ctx.scaling)
        dx = torch.empty_like(flat) if ctx.needs_input_grad[1] else None
        dAs: list[Tensor | None] = []
        for (start, end), A in zip(a_spans, As, strict=True):
            dAs.append(dh[start:end].mT @ flat[start:end] if A.requires_grad else None)
            if dx is not None:
                torch.mm(dh[start:end], A, out=dx[start:end])
        dx = None if dx is None else dx.view(ctx.shape)
        return grads[0], dx, None, None, None, *dAs, *dBs
