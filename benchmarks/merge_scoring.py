"""Rows measured under an adapter, or each under its own gates on one: NLL and greedy answers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tclora.adapter import Adapter
from tclora.model.attach import attached
from tclora.model.loss import logits_of
from tclora.model.packing import Pack
from tclora.model.reading import Part
from tclora.model.tokens import IGNORED
from tclora.route import GatedAdapter, Routing
from tclora.tune.fallback import unit_adapter


@dataclass(frozen=True)
class Routed:
    """A gated adapter, and where each of the measured rows goes."""

    gated: GatedAdapter
    routing: Routing

    @cached_property
    def unit(self) -> Adapter:
        """The unit components, to be gated."""
        return unit_adapter(self.gated)


def under(
    model: Any,  # noqa: ANN401
    adapter: Adapter | Routed | None,
    places: Sequence[int],
    lengths: Sequence[int] | None,
) -> AbstractContextManager[None]:
    """Attach what the rows of these places pass through, each by its own gates if routed.

    They stand behind each other if lengths are given, and side by side otherwise.
    """
    if not isinstance(adapter, Routed):
        return attached(model, adapter)
    routing, gated = adapter.routing.take(places), adapter.gated
    weights, shares = torch.from_numpy(routing.weights), torch.from_numpy(routing.shares)
    repeats = None if lengths is None else torch.tensor(lengths)
    gates = {}
    for module, own in gated.gates.items():
        elsewhere = gated.elsewhere(module).float()
        gate = torch.lerp(elsewhere[None], weights @ own, shares[:, None])  # (rows, R)
        gates[module] = gate[:, None] if repeats is None else gate.repeat_interleave(repeats, 0)
    return attached(model, adapter.unit, gates)


def score_part(model: Any, part: Part) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """Return each row's NLL (nats) and whether every response token is the likeliest one.

    Logits are computed at the supervised positions alone. The part is packed or padded; where it is
    packed, the model must be ready to read it.
    """
    content, device = part.content, model.device
    given = {"input_ids": content.input_ids.to(device), "use_cache": False}
    given["position_ids"] = content.position_ids.to(device)
    if isinstance(content, Pack):
        labels, owners = content.labels.to(device), content.owners.to(device)
        hidden = model.get_decoder()(row_lengths=content.lengths, **given).last_hidden_state[0]
        logits = model.get_output_embeddings()(hidden[content.places.to(device)])
    else:
        kept = content.labels.to(device) != IGNORED
        labels, owners = content.labels.to(device)[kept], kept.nonzero()[:, 0]
        given["attention_mask"] = content.attention_mask.to(device)
        with logits_of(model, lambda hidden: hidden[kept].unsqueeze(0)):
            logits = model(logits_to_keep=kept.shape[1], **given).logits[0]
    logits = logits.float()  # (supervised, vocabulary)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    wrong = (logits.argmax(1) != labels).float()
    zeros = losses.new_zeros(len(part.rows))
    return zeros.index_add(0, owners, losses), zeros.index_add(0, owners, wrong) == 0
