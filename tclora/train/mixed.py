"""LoRA layers for parts whose rows belong to several adapters.

Shapes: N tokens of all rows, K adapters; x (..., d_in) of N tokens; A (r, d_in); B (d_out, r). The
weights of all adapters lie behind each other, module by module, B transposed; every adapter's own
are views of them, and so are the gradients, to which the backward pass adds.

Rows of one adapter stand next to each other, so that its part is a slice with a product of its own:
as many operations as one adapter would take for all rows, however many there are. On CPU that is
faster than one product with all factors stacked and other adapters' components masked out, and than
batched products over factors gathered per row (``benchmarks/mixed_lora.py``). On a GPU it is not:
many small products keep it waiting, so that there the stacked product is taken. A value that is not
finite stays with its adapter in slices alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.errors import ModelError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class MixedLora:
    """Several adapters placed in one model; each row of a part passes through its own.

    Parameters
    ----------
    model : PreTrainedModel
        The base, whose weights are frozen; its modules compute the updates too from here on.
    weights : sequence of Mapping[str, Parameter]
        Per adapter: PEFT's name → weight. Adapters may share an A that is not trained. Their values
        are moved to where all lie together. Those that require a gradient have one from here on, of
        zeros at first, to which backward passes add.
    scaling : float
        Factor of B A x.
    dropout : float
        Probability; applied to x.
    stacked : bool, optional
        Whether adapters that share a part pass through one product with all their factors; by
        default on a GPU.

    Attributes
    ----------
    modules : list of str
        Paths of the modules that are updated.
    stacked : bool
        As given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Sequence[Mapping[str, nn.Parameter]],
        *,
        scaling: float,
        dropout: float = 0.0,
        stacked: bool | None = None,
    ) -> None:
        names = [name for name in weights[0] if name.endswith(A_WEIGHT)]
        self.modules = [module_of(name) for name in names]
        self.stacked = model.device.type == "cuda" if stacked is None else stacked
        self._owners: list[int] = []
        self._lengths: list[int] | None = None
        self._part: _Part | None = None
        self._dropout = dropout
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._updates: list[_Updates] = []
        for name, path in zip(names, self.modules, strict=True):
            As = [own[name] for own in weights]
            Bs = [own[name.removesuffix(A_WEIGHT) + B_WEIGHT] for own in weights]
            self._updates.append(_Updates.of(path, As, Bs, scaling))
            self._place(model, self._updates[-1])

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
            self._owners, self._part = [], None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Take slices while the context lasts, so that no adapter's values reach another."""
        before, self.stacked = self.stacked, False
        try:
            yield
        finally:
            self.stacked = before

    def finite(self) -> bool:
        """Return whether all gradients are finite."""
        found = [d for own in self._updates for d in (own.grad_a, own.grad_b) if d is not None]
        return bool(torch.stack(torch._foreach_norm(found)).isfinite().all())

    def _place(self, model: PreTrainedModel, updates: "_Updates") -> None:
        module = model.get_submodule(updates.path)
        if type(module) is nn.Linear and not self._dropout:
            own = self._linear(module, updates)
            module.forward = own  # type: ignore[method-assign,assignment]
        else:
            module.register_forward_hook(self._hook(updates))

    def _linear(self, module: nn.Linear, updates: "_Updates") -> Callable[[Tensor], Tensor]:
        """Return a forward that computes a linear layer and its updates at once."""

        def forward(x: Tensor) -> Tensor:
            if not self._owners:
                return nn.functional.linear(x, module.weight, module.bias)
            updated: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                x, module.weight, module.bias, updates, self._of(updates, x), self._anchor
            )
            return updated

        return forward

    def _hook(self, updates: "_Updates") -> Hook:
        """Return a hook that adds the updates to what any other module has computed."""

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._owners:
                return output
            x = inputs[0]
            part = self._of(updates, x)
            if self._dropout:
                x = nn.functional.dropout(x, self._dropout)
            if output._base is not None:  # a view cannot be added to in place
                output = output.clone()
            updated: Tensor = _Update.apply(  # type: ignore[no-untyped-call]
                output, x, updates, part, self._anchor
            )
            return updated

        return add

    def _of(self, updates: "_Updates", x: Tensor) -> "_Part":
        """Return whose the tokens are, the same for all modules that see them."""
        tokens, rows = x.shape[:-1].numel(), len(self._owners)
        even = self._lengths is None and x.dim() > 2 and x.shape[0] == rows
        if self._part and self._part.tokens == tokens and (even or self._lengths is not None):
            return self._part
        lengths = [tokens // rows] * rows if even else self._lengths or []
        if sum(lengths) != tokens:
            raise ModelError(
                f"input of {updates.path} must hold every token of {rows} rows, got "
                f"{tuple(x.shape)}; choose other train.target_modules"
            )
        self._part = _Part.of(self._owners, lengths, updates, x.device if self.stacked else None)
        return self._part


@dataclass(eq=False)
class _Part:
    """Whose tokens pass through the model.

    Attributes
    ----------
    spans : list of tuple
        First and last + 1 token of every adapter in the part, and which it is.
    tokens : int
        N.
    mask : Tensor or None
        (N, k r), of the k adapters in the part: True where a component is not of the token's own;
        None where slices are taken.
    chosen : Tensor or None
        (k,) these adapters; None if they are all, in their order.
    """

    spans: list[tuple[int, int, int]]
    tokens: int
    mask: Tensor | None = None
    chosen: Tensor | None = None

    @classmethod
    def of(
        cls,
        owners: Sequence[int],
        lengths: Sequence[int],
        updates: "_Updates",
        device: torch.device | None,
    ) -> "_Part":
        """Collect the rows of every adapter; with masks for products on a device, if given."""
        spans, start = [], 0
        for owner, group in groupby(zip(owners, lengths, strict=True), key=lambda row: row[0]):
            end = start + sum(length for _, length in group)
            spans.append((start, end, owner))
            start = end
        if device is None or len(spans) == 1:
            return cls(spans, start)
        counts = torch.tensor([end - first for first, end, _ in spans])
        token = counts.new_tensor(range(len(spans))).repeat_interleave(counts).to(device)
        K, r, _ = updates.B.shape
        component = torch.arange(len(spans), device=device).repeat_interleave(r)
        present = [owner for *_, owner in spans]
        chosen = None if present == list(range(K)) else torch.tensor(present, device=device)
        return cls(spans, start, token[:, None] != component, chosen)

    def rows_of(self, stack: Tensor) -> Tensor:
        """Return the part's adapters of a stack (K, r, d) below each other, (k r, d)."""
        own = stack if self.chosen is None else stack[self.chosen]
        return own.view(-1, stack.shape[-1])

    def add(self, stack: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
        """Add (k r, d) to a stack (K, r, d); `gradient` adds it to what it is given."""
        if self.chosen is None:
            gradient(stack.view(-1, stack.shape[-1]))
        else:
            found = gradient(stack.new_zeros(len(self.chosen) * stack.shape[1], stack.shape[2]))
            stack.index_add_(0, self.chosen, found.view(-1, *stack.shape[1:]))


@dataclass(eq=False)
class _Updates:
    """The weights of all adapters for one module, and their gradients.

    Attributes
    ----------
    path : str
        Of the module.
    A, B : Tensor
        (K, r, d_in), or (1, r, d_in) if all share theirs; (K, r, d_out).
    grad_a, grad_b : Tensor or None
        Gradients, of their shapes; None where A is not trained.
    scaling : float
        Factor of B A x.
    """

    path: str
    A: Tensor
    B: Tensor
    grad_a: Tensor | None
    grad_b: Tensor
    scaling: float

    @classmethod
    def of(
        cls, path: str, As: Sequence[nn.Parameter], Bs: Sequence[nn.Parameter], scaling: float
    ) -> "_Updates":
        """Move the weights of adapters to where they lie together."""
        shared = all(A is As[0] for A in As) and not As[0].requires_grad
        A = torch.stack([A.detach() for A in (As[:1] if shared else As)])
        B = torch.stack([B.detach().mT for B in Bs])
        dA = torch.zeros_like(A) if As[0].requires_grad else None
        dB = torch.zeros_like(B)
        for k, (own_A, own_B) in enumerate(zip(As, Bs, strict=True)):
            own_A.data, own_B.data = A[0 if shared else k], B[k].mT
            own_B.grad = dB[k].mT
            if dA is not None:
                own_A.grad = dA[k]
        return cls(path, A, B, dA, dB, scaling)

    def apply(self, out: Tensor, flat: Tensor, part: _Part) -> Tensor:
        """Add s B_k A_k x to the output, (N, d_out), of x (N, d_in); return A x.

        A x is (N, r), or (N, k r) with the other adapters' components set to 0.
        """
        shared = len(self.A) == 1
        if part.mask is not None:
            if shared:
                h = (flat @ self.A[0].mT).repeat(1, len(part.spans))
            else:
                h = flat @ part.rows_of(self.A).mT
            h.masked_fill_(part.mask, 0.0)
            out.addmm_(h, part.rows_of(self.B), alpha=self.scaling)
            return h
        h = flat.new_empty(len(flat), self.A.shape[1])
        for start, end, k in [(0, part.tokens, 0)] if shared else part.spans:
            torch.mm(flat[start:end], self.A[k].mT, out=h[start:end])
        for start, end, k in part.spans:
            out[start:end].addmm_(h[start:end], self.B[k], alpha=self.scaling)
        return h

    def gradients(
        self, dy: Tensor, flat: Tensor, h: Tensor, part: _Part, dx: Tensor | None
    ) -> None:
        """Add to the gradients of all A and B, and the update's part to that of x, if wanted."""
        if part.mask is not None:
            self._stacked_gradients(dy, flat, h, part, dx)
            return
        dh = torch.empty_like(h)
        for start, end, k in part.spans:
            torch.mm(dy[start:end], self.B[k].mT, out=dh[start:end])
            self.grad_b[k].addmm_(h[start:end].mT, dy[start:end], alpha=self.scaling)
        As = self.A.expand(len(self.B), -1, -1)
        for start, end, k in part.spans:
            if self.grad_a is not None:
                self.grad_a[k].addmm_(dh[start:end].mT, flat[start:end], alpha=self.scaling)
            if dx is not None:
                dx[start:end].addmm_(dh[start:end], As[k], alpha=self.scaling)

    def _stacked_gradients(
        self, dy: Tensor, flat: Tensor, h: Tensor, part: _Part, dx: Tensor | None
    ) -> None:
        mask, B = part.mask, part.rows_of(self.B)
        if mask is None:
            raise RuntimeError("stacked products need a mask")
        s = self.scaling
        dh = (dy @ B.mT).masked_fill_(mask, 0.0)  # (N, k r)
        part.add(self.grad_b, lambda dB: dB.addmm_(h.mT, dy, alpha=s))
        if self.grad_a is not None:
            part.add(self.grad_a, lambda dA: dA.addmm_(dh.mT, flat, alpha=s))
        if dx is None:
            return
        if len(self.A) == 1:
            dx.addmm_(dh.view(len(dh), len(part.spans), -1).sum(1), self.A[0], alpha=s)
        else:
            dx.addmm_(dh, part.rows_of(self.A), alpha=s)


class _Linear(torch.autograd.Function):
    """A frozen linear layer with the updates of several adapters.

    The last argument requires a gradient, so that a backward pass comes by where x needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        updates: _Updates,
        part: _Part,
        _: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, d_in)
        out = nn.functional.linear(flat, weight, bias)  # (N, d_out)
        h = updates.apply(out, flat, part)
        ctx.save_for_backward(flat, h, weight)
        ctx.updates, ctx.part, ctx.shape = updates, part, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat, h, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (N, d_out)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        ctx.updates.gradients(dy, flat, h, ctx.part, dx)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, None


class _Update(torch.autograd.Function):
    """The updates of several adapters, added in place to what a module has computed.

    As to the last argument see `_Linear`.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        x: Tensor,
        updates: _Updates,
        part: _Part,
        _: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, d_in)
        h = updates.apply(output.view(-1, output.shape[-1]), flat, part)
        ctx.save_for_backward(flat, h)
        ctx.updates, ctx.part, ctx.shape = updates, part, x.shape
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat, h = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (N, d_out)
        dx = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        ctx.updates.gradients(dy, flat, h, ctx.part, dx)
        return grads[0], None if dx is None else dx.view(ctx.shape), None, None, None
