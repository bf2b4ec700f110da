"""Several LoRA adapters in one model, for parts whose rows belong to several of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.errors import ModelError
from tclora.train.lora import A_WEIGHT, B_WEIGHT, module_of
from tclora.train.updates import Ownership, Updates, add_updates, updated_linear

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
        self._part: Ownership | None = None
        self._dropout = dropout
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._updates: list[Updates] = []
        for name, path in zip(names, self.modules, strict=True):
            As = [own[name] for own in weights]
            Bs = [own[name.removesuffix(A_WEIGHT) + B_WEIGHT] for own in weights]
            self._updates.append(Updates.of(path, As, Bs, scaling))
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

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of all adapters, per module and factor."""
        return [d for own in self._updates for d in (own.grad_a, own.grad_b) if d is not None]

    def finite(self) -> bool:
        """Return whether all gradients are finite."""
        norms = torch._foreach_norm(self.gradients, 2, dtype=torch.float32)
        return bool(torch.stack(norms).isfinite().all())

    def _place(self, model: PreTrainedModel, updates: Updates) -> None:
        module = model.get_submodule(updates.path)
        if type(module) is nn.Linear and not self._dropout:
            own = self._linear(module, updates)
            module.forward = own  # type: ignore[method-assign,assignment]
        else:
            module.register_forward_hook(self._hook(updates))

    def _linear(self, module: nn.Linear, updates: Updates) -> Callable[[Tensor], Tensor]:
        """Return a forward that computes a linear layer and its updates at once."""

        def forward(x: Tensor) -> Tensor:
            if not self._owners:
                return nn.functional.linear(x, module.weight, module.bias)
            return updated_linear(x, module, updates, self._of(updates, x), self._anchor)

        return forward

    def _hook(self, updates: Updates) -> Hook:
        """Return a hook that adds the updates to what any other module has computed."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._owners:
                return output
            x = inputs[0]
            part = self._of(updates, x)
            if self._dropout:
                x = nn.functional.dropout(x, self._dropout, module.training)
            if output._base is not None:  # a view cannot be added to in place
                output = output.clone()
            return add_updates(output, x, updates, part, self._anchor)

        return add

    def _of(self, updates: Updates, x: Tensor) -> Ownership:
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
        device = x.device if self.stacked else None
        self._part = Ownership.of(self._owners, lengths, updates.size, device)
        return self._part
