"""How rows of unequal length pass through a model: behind each other, or padded side by side.

Rows stand behind each other without padding (`Packed`), with faster parts in place of the model's
own, wherever that gives what the model gives, and on a GPU where flash attention reads them so
(in bf16 and fp16); everywhere else they are padded (`Padded`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.model.kernels.attention import has_flash, with_sound_gradients
from tclora.model.kernels.cross_entropy import linear_cross_entropy
from tclora.model.loss import chunked_nll, plain_head, response_nll, supervised_nll
from tclora.model.packing import Pack, pack, packs
from tclora.model.substitutes import find_substitutes, substituted
from tclora.model.tokens import Batch, TokenRow, batches, collate

logger = logging.getLogger(__name__)
_Nll = Callable[[PreTrainedModel, Batch], Tensor]
_TRIED = (TokenRow((5, 9, 7), (8, 6)), TokenRow((6, 8), (7, 5, 9, 4, 6)))


class Part(NamedTuple):
    """Rows that pass through a model at once.

    Attributes
    ----------
    content : Batch or Pack
        Their tokens.
    rows : tuple of int
        Indices of the rows in the sequence the part was made from.
    lengths : tuple of int or None
        Positions of every row; None where all have the same number.
    tokens, positions : int
        Tokens of all rows, and positions computed for them.
    """

    content: Batch | Pack
    rows: tuple[int, ...]
    lengths: tuple[int, ...] | None
    tokens: int
    positions: int


class Reading(Protocol):
    """A way to read rows."""

    def ready(self) -> AbstractContextManager[None]:
        """Return the context in which losses and their gradients are computed."""

    def parts(
        self, rows: Sequence[TokenRow], token_budget: int, groups: Sequence[int] | None = None
    ) -> Iterator[Part]:
        """Yield parts of at most `token_budget` positions, or of one row.

        Parameters
        ----------
        rows : sequence of TokenRow
            Any order.
        token_budget : int
            Positions per part.
        groups : sequence of int, optional
            A number per row; those of equal number stand next to each other in a part.
        """

    def losses(self, part: Part) -> Tensor:
        """Return the summed response NLL of every row of a part, (rows,) float32, nats."""


class Padded:
    """Rows of similar length side by side, padded on the left.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM; see `tclora.model.loss`.
    nll : callable
        Computes the losses of a batch.
    """

    def __init__(self, model: PreTrainedModel, nll: _Nll = supervised_nll) -> None:
        self._model, self._nll = model, nll

    def ready(self) -> AbstractContextManager[None]:
        """Change nothing but which of torch's attentions is used."""
        return with_sound_gradients()

    def parts(
        self, rows: Sequence[TokenRow], token_budget: int, groups: Sequence[int] | None = None
    ) -> Iterator[Part]:
        """Yield batches, longest first."""
        # What pads is masked out, so that any token serves.
        for batch in batches(rows, pad_id=0, token_budget=token_budget):
            chosen = batch.rows
            if groups is not None:
                chosen = tuple(sorted(chosen, key=lambda index: groups[index]))
                batch = collate(rows, chosen, pad_id=0)
            tokens = sum(len(rows[index]) for index in chosen)
            yield Part(batch, chosen, None, tokens, batch.input_ids.numel())

    def losses(self, part: Part) -> Tensor:
        """Return the summed response NLL of every row of a part."""
        return self._nll(self._model, cast("Batch", part.content)).sum(1)


class Packed:
    """Rows behind each other, with the substitutes of `tclora.model.substitutes`.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM without trained weights for which `reading` chooses this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._substitutes = model, find_substitutes(model)

    def ready(self) -> AbstractContextManager[None]:
        """Put the substitutes in place."""
        return substituted(self._model, self._substitutes)

    def parts(
        self, rows: Sequence[TokenRow], token_budget: int, groups: Sequence[int] | None = None
    ) -> Iterator[Part]:
        """Yield packs, group after group, the longest rows of each first."""
        own = groups or [0] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: (own[index], -len(rows[index])))
        for content in packs(rows, token_budget=token_budget, order=order):
            tokens = content.tokens
            yield Part(content, content.rows, content.lengths, tokens, tokens)

    def losses(self, part: Part) -> Tensor:
        """Return the summed response NLL of every row of a part."""
        content = cast("Pack", part.content)
        device = self._model.device
        places, labels = content.places.to(device), content.labels.to(device)
        hidden = self._model.get_decoder()(
            input_ids=content.input_ids.to(device),
            position_ids=content.position_ids.to(device),
            row_lengths=content.lengths,
            use_cache=False,
        ).last_hidden_state[0]  # (N, d)
        head = self._model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        losses = linear_cross_entropy(hidden[places], head.weight, bias, labels)  # (S,)
        sums = losses.new_zeros(len(part.rows))
        return sums.index_add(0, content.owners.to(device), losses)


def reading(model: PreTrainedModel, longest: int, *, head_trained: bool = False) -> Reading:
    """Choose how a model reads rows.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM in evaluation mode, without trained weights.
    longest : int
        Tokens of the longest row.
    head_trained : bool
        Whether the output layer has an adapter of its own.
    """
    if head_trained:  # its adapter must see whole rows
        return Padded(model, response_nll)
    suited = model.device.type == "cpu" or has_flash(model.device, model.dtype)
    packed = _packed(model, longest) if suited else None
    return packed or Padded(model, chunked_nll if plain_head(model) else supervised_nll)


def head_among(model: PreTrainedModel, modules: Iterable[str]) -> bool:
    """Return whether one of these modules is the output layer."""
    head = model.get_output_embeddings()
    return any(model.get_submodule(module) is head for module in modules)


def _packed(model: PreTrainedModel, longest: int) -> Packed | None:
    """Return the packed reading if two short rows in one pack give what the model's own code does.

    It is None where they do not.
    """
    window = getattr(model.config, "sliding_window", None)
    if not model._can_set_attn_implementation() or (window is not None and window < longest):
        return None
    padded = Padded(model)
    (part,) = padded.parts(_TRIED, 100)
    with torch.no_grad():
        wanted = padded.losses(part)
        try:
            packed = Packed(model)
            with packed.ready(), torch.random.fork_rng(devices=[]):
                content = part._replace(content=pack(_TRIED, part.rows))
                found = packed.losses(content)
                model.train()
                trained = _has_gradients(model, packed, content)
        except (NotImplementedError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            logger.info("rows are padded, since %s cannot read them packed: %s",
                        type(model).__name__, error)  # fmt: skip
            return None
        finally:
            model.eval()
    same = torch.allclose(found, wanted, rtol=0.3 * torch.finfo(model.dtype).eps ** 0.5, atol=0.0)
    if not (trained and same):
        logger.info("rows are padded, since %s reads them otherwise packed", type(model).__name__)
        return None
    return packed


def _has_gradients(model: PreTrainedModel, read: Reading, part: Part) -> bool:
    """Try a training pass: it is refused where attention drops scores in training."""
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        embedded.append(output.requires_grad_(True))

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(read.losses(part).sum(), embedded[:1])
    finally:
        handle.remove()
    return bool(gradient.isfinite().all())
