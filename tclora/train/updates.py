"""The updates of several adapters to one module, forward and backward.

Shapes: N tokens of all rows, K adapters; x (..., d_in) of N tokens; A (r, d_in); B (d_out, r). The
weights of all adapters lie behind each other, B transposed; every adapter's own are views of them,
and so are the gradients, to which the backward pass adds.

Rows of one adapter stand next to each other, so that its part is a slice with a product of its own:
as many operations as one adapter would take for all rows, however many there are. On CPU that is
faster than one product with all factors stacked and other adapters' components masked out, and than
batched products over factors gathered per row (``benchmarks/mixed_lora.py``). On a GPU it is not:
many small products keep it waiting, so that there the stacked product is taken. A value that is not
finite stays with its adapter in slices alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Ownership:
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
        size: tuple[int, int],
        device: torch.device | None,
    ) -> "Ownership":
        """Collect the rows of every adapter.

        Parameters
        ----------
        owners, lengths : sequence of int
            Adapter and tokens of every row.
        size : tuple of int
            Adapters in all, and their rank.
        device : torch.device or None
            Where stacked products are computed; None: slices are taken.
        """
        spans, start = [], 0
        for owner, group in groupby(zip(owners, lengths, strict=True), key=lambda row: row[0]):
            end = start + sum(length for _, length in group)
            spans.append((start, end, owner))
            start = end
        if device is None or len(spans) == 1:
            return cls(spans, start)
        counts = torch.tensor([end - first for first, end, _ in spans])
        token = counts.new_tensor(range(len(spans))).repeat_interleave(counts).to(device)
        K, r = size
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
class Updates:
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
    ) -> "Updates":
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

    @property
    def size(self) -> tuple[int, int]:
        """Adapters, and their rank."""
        return len(self.B), self.B.shape[1]

    def apply(self, out: Tensor, flat: Tensor, part: Ownership) -> Tensor:
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
        self, dy: Tensor, flat: Tensor, h: Tensor, part: Ownership, dx: Tensor | None
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
        self, dy: Tensor, flat: Tensor, h: Tensor, part: Ownership, dx: Tensor | None
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


def updated_linear(
    x: Tensor, module: nn.Linear, updates: Updates, part: Ownership, anchor: Tensor
) -> Tensor:
    """Return what a frozen linear layer and the updates of several adapters make of x.

    Parameters
    ----------
    x : Tensor
        (..., d_in).
    module : nn.Linear
        The layer.
    updates : Updates
        The adapters' weights.
    part : Ownership
        Whose the tokens are.
    anchor : Tensor
        Any that requires a gradient, so that a backward pass comes by where x needs none.
    """
    updated: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, module.weight, module.bias, updates, part, anchor
    )
    return updated


def add_updates(
    output: Tensor, x: Tensor, updates: Updates, part: Ownership, anchor: Tensor
) -> Tensor:
    """Add the updates of several adapters, in place, to what a module has made of x.

    For the parameters see `updated_linear`; `output` is (..., d_out) and no view.
    """
    added: Tensor = _Update.apply(  # type: ignore[no-untyped-call]
        output, x, updates, part, anchor
    )
    return added


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        updates: Updates,
        part: Ownership,
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
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        x: Tensor,
        updates: Updates,
        part: Ownership,
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
