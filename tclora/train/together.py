"""The engine `together`: all adapters of a job at once, on one copy of the base model.

A micro-batch mixes rows of several adapters, sorted by length and filled up to the token budget, so
that short steps fill it too. What belongs to one adapter stays its own: row order, loss, gradient,
clipping, schedule, number of steps, checkpoints. Adapters that have finished leave the batches.

Which rows share a micro-batch follows from the requests alone. After a resume with adapters at
unequal steps, the rows of those ahead keep their places until the others have caught up, without
effect on their adapters; so every adapter ends with the same bytes as without the interruption.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.jobs.call import EventCallback
from tclora.jobs.devices import visible_gpus
from tclora.model.base import Base, LoadedBase
from tclora.model.loss import response_nll, supervised_nll
from tclora.model.tokens import Batch, TokenRow, batches
from tclora.train.course import Checkpoint, Course, Destination, TrainingResult
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.registry import AdapterRequest, engines

Weights = dict[str, nn.Parameter]


class Together:
    """All adapters of a device at once, on one base model, their rows in the same batches."""

    def divide(self, sizes: Mapping[str, int], slots: int) -> list[list[str]]:
        """Put all adapters in one job; with several GPUs and slots, in one for each.

        Rows are spread evenly. Without a GPU there is one job, which has all cores.
        """
        count = max(1, min(slots, len(visible_gpus()), len(sizes)))
        groups: list[list[str]] = [[] for _ in range(count)]
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            min(groups, key=lambda group: sum(sizes[member] for member in group)).append(name)
        return [group for group in groups if group]

    def train(
        self,
        base: Base,
        requests: Sequence[AdapterRequest],
        config: AdapterConfig,
        *,
        checkpoint_steps: int,
        on_event: EventCallback,
    ) -> dict[str, TrainingResult]:
        """Train the adapters side by side."""
        loaded = base.load()
        # Their order in a batch must not depend on the order of the requests.
        ordered = sorted(requests, key=lambda request: request.name)
        weights = _weights(loaded.model, config, [request.init_seed for request in ordered])
        members = [
            _member(loaded, request, own, config, checkpoint_steps, on_event)
            for request, own in zip(ordered, weights, strict=True)
        ]
        mixed = MixedLora(
            loaded.model, weights, scaling=config.alpha / config.r, dropout=config.dropout
        )
        if config.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        loaded.model.train()
        results = _Job(loaded.model, mixed, members, config, ordered[0].seed).run()
        return {request.name: results[request.name] for request in requests}


engines.register("together")(Together())


class _Member(NamedTuple):
    name: str
    rows: Sequence[TokenRow]
    course: Course


class _Row(NamedTuple):
    """A row of the current step with the adapter it belongs to."""

    owner: int
    tokens: TokenRow


def _weights(
    model: PreTrainedModel, config: AdapterConfig, init_seeds: Sequence[int]
) -> list[Weights]:
    """Return fresh weights per adapter; those of equal seed share an A that is not trained."""
    fresh = {seed: fresh_weights(model, config, seed) for seed in sorted(set(init_seeds))}
    return [
        {
            name: weight
            if config.freeze_a and ".lora_A." in name
            else nn.Parameter(weight.detach().clone())
            for name, weight in fresh[seed].items()
        }
        for seed in init_seeds
    ]


def _member(
    loaded: LoadedBase,
    request: AdapterRequest,
    weights: Weights,
    config: AdapterConfig,
    checkpoint_steps: int,
    on_event: EventCallback,
) -> _Member:
    def on_step(record: dict[str, Any]) -> None:
        on_event({"name": request.name, **record})

    rows = loaded.encode(request.rows)
    checkpoint = Checkpoint(request.checkpoint, checkpoint_steps)
    destination = Destination(request.target, loaded.base.location, checkpoint, on_step)
    course = Course(weights, len(rows), config, seed=request.seed, destination=destination)
    return _Member(request.name, rows, course)


class _Job(NamedTuple):
    """The model with all adapters, and what trains them."""

    model: PreTrainedModel
    mixed: MixedLora
    members: Sequence[_Member]
    config: AdapterConfig
    seed: int  # of dropout

    @property
    def nll(self) -> Callable[[PreTrainedModel, Batch], Tensor]:
        """The loss; an adapter of the output layer itself needs to see all rows."""
        head = self.model.get_output_embeddings()
        trained = [self.model.get_submodule(path) for path in self.mixed.modules]
        return response_nll if any(module is head for module in trained) else supervised_nll

    def run(self) -> dict[str, TrainingResult]:
        """Take all steps of all adapters; return the results by name."""
        courses = [member.course for member in self.members]
        start = min(len(course.history) for course in courses)
        orders = [course.orders(start) for course in courses]
        results = {}
        for step in range(start, max(course.total for course in courses) + 1):
            for member in self.members:
                if member.course.total == step or (step == start and member.course.total < step):
                    results[member.name] = member.course.finish()
            rows = [
                _Row(owner, member.rows[index])
                for owner, (member, order) in enumerate(zip(self.members, orders, strict=True))
                for index in next(order, ())
            ]
            if rows:
                self._step(step, rows)
        return results

    def _step(self, step: int, rows: Sequence[_Row]) -> None:
        """Take a step with every adapter that has not taken it before a resume."""
        tokens: Counter[int] = Counter()
        for row in rows:
            tokens[row.owner] += len(row.tokens.response)
        live = {owner for owner in tokens if len(self.members[owner].course.history) == step}
        losses = dict.fromkeys(tokens, 0.0)
        for number, (batch, owners) in enumerate(_parts(rows, self.config.tokens_per_forward)):
            if live.isdisjoint(owners):
                continue
            if self.config.dropout:  # the same after a resume
                torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + number)
            shares = [1 / tokens[owner] for owner in owners]
            for owner, loss in zip(owners, self._gradients(batch, owners, shares), strict=True):
                losses[owner] += loss
        for owner in losses:
            course = self.members[owner].course
            if owner in live:
                course.advance(losses[owner], tokens[owner])
            else:
                course.stand()

    def _gradients(
        self, batch: Batch, owners: Sequence[int], shares: Sequence[float]
    ) -> list[float]:
        """Add to the gradients of all adapters in the batch; return each row's part of the loss."""
        with self.mixed.rows(owners):
            losses = self.nll(self.model, batch).sum(1)  # (rows,)
            losses = losses * torch.tensor(shares, device=losses.device)
            losses.sum().backward()
        parts: list[float] = losses.tolist()
        return parts


def _parts(rows: Sequence[_Row], token_budget: int) -> Iterator[tuple[Batch, list[int]]]:
    """Yield micro-batches with the owners of their rows, those of one adapter adjacent."""
    # What pads is masked out, so that any token serves.
    for batch in batches([row.tokens for row in rows], pad_id=0, token_budget=token_budget):
        order = sorted(range(len(batch.rows)), key=lambda place: rows[batch.rows[place]].owner)
        grouped = Batch(
            batch.input_ids[order],
            batch.attention_mask[order],
            batch.position_ids[order],
            batch.labels[order],
            tuple(batch.rows[place] for place in order),
        )
        yield grouped, [rows[index].owner for index in grouped.rows]
