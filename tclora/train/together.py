"""The engine `together`: all adapters of a job at once, on one copy of the base model.

A micro-batch mixes rows of several adapters, sorted by length and filled up to the token budget, so
that short steps fill it too. What belongs to one adapter stays its own: row order, loss, gradient,
clipping, schedule, number of steps, validation, checkpoints. Adapters that have finished or whose
loss is no number any more leave the batches; the others go on.

Which rows share a micro-batch follows from the requests alone. After a resume with adapters at
unequal steps, the rows of those ahead keep their places until the others have caught up, without
effect on their adapters; so every adapter ends with the same bytes as without the interruption.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.errors import NonFiniteLossError
from tclora.jobs.call import EventCallback
from tclora.jobs.devices import visible_gpus
from tclora.model.base import Base, LoadedBase
from tclora.model.loss import response_nll, supervised_nll
from tclora.model.tokens import Batch, TokenRow, batches
from tclora.train.budget import TokenBudget
from tclora.train.course import (
    Checkpoint,
    Course,
    Destination,
    StepLoss,
    TrainingResult,
    hold_out,
)
from tclora.train.loop import validation_nll
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.registry import AdapterRequest, engines

logger = logging.getLogger(__name__)
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
        mixed = MixedLora(loaded.model, weights, scaling=config.scaling, dropout=config.dropout)
        place = _Place(loaded, mixed, config, checkpoint_steps, on_event)
        members = [
            place.member(owner, request, own)
            for owner, (request, own) in enumerate(zip(ordered, weights, strict=True))
        ]
        if config.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        loaded.model.train()
        budget = TokenBudget(config.tokens_per_forward)
        results = _Job(loaded.model, mixed, members, config, ordered[0].seed, budget).run()
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


class _Place(NamedTuple):
    """Where the adapters of a job are trained."""

    loaded: LoadedBase
    mixed: MixedLora
    config: AdapterConfig
    checkpoint_steps: int
    on_event: EventCallback

    def member(self, owner: int, request: AdapterRequest, weights: Weights) -> _Member:
        """Begin or resume the course of one adapter."""

        def on_step(record: dict[str, Any]) -> None:
            self.on_event({"name": request.name, **record})

        config = self.config
        rows = self.loaded.encode(request.rows)
        rows, watched = hold_out(rows, config.validation_fraction, request.seed)
        checkpoint = Checkpoint(request.checkpoint, self.checkpoint_steps)
        course = Course(
            weights,
            len(rows),
            config,
            seed=request.seed,
            destination=Destination(request.target, self.loaded.base.location, checkpoint, on_step),
            validate=partial(self._validate, owner, watched) if watched else None,
        )
        return _Member(request.name, rows, course)

    def _validate(self, owner: int, rows: Sequence[TokenRow]) -> float:
        model, budget = self.loaded.model, self.config.tokens_per_forward
        return validation_nll(model, rows, budget, partial(self._alone, owner))

    def _alone(self, owner: int, batch: Batch) -> AbstractContextManager[None]:
        return self.mixed.rows([owner] * len(batch.rows))


class _Job(NamedTuple):
    """The model with all adapters, and what trains them."""

    model: PreTrainedModel
    mixed: MixedLora
    members: Sequence[_Member]
    config: AdapterConfig
    seed: int  # of dropout
    budget: TokenBudget

    @property
    def nll(self) -> Callable[[PreTrainedModel, Batch], Tensor]:
        """The loss; an adapter of the output layer itself needs to see all rows."""
        head = self.model.get_output_embeddings()
        trained = [self.model.get_submodule(path) for path in self.mixed.modules]
        return response_nll if any(module is head for module in trained) else supervised_nll

    def run(self) -> dict[str, TrainingResult]:
        """Take all steps of all adapters; return the results by name.

        Raises
        ------
        NonFiniteLossError
            Once the others are finished, if the loss of an adapter became NaN or infinite.
        """
        courses = [member.course for member in self.members]
        start = min(len(course.history) for course in courses)
        orders = [course.orders(start) for course in courses]
        results: dict[str, TrainingResult] = {}
        failed: dict[int, NonFiniteLossError] = {}
        for step in range(start, max(course.total for course in courses) + 1):
            for member in self.members:
                course = member.course
                if member.name not in results and course.done and len(course.history) <= step:
                    results[member.name] = course.finish()
            rows = [
                _Row(owner, member.rows[index])
                for owner, (member, order) in enumerate(zip(self.members, orders, strict=True))
                if owner not in failed
                for index in next(order, ())
            ]
            if rows:
                failed |= self._step(step, rows)
        if failed:
            raise NonFiniteLossError("; ".join(str(error) for error in failed.values()))
        return results

    def _step(self, step: int, rows: Sequence[_Row]) -> dict[int, NonFiniteLossError]:
        """Take a step with every adapter that has not taken it before a resume."""
        tokens: Counter[int] = Counter()
        for row in rows:
            tokens[row.owner] += len(row.tokens.response)
        live = {owner for owner in tokens if len(self.members[owner].course.history) == step}
        seen = self.budget.within(
            partial(self._losses, step, rows, tokens, live),
            partial(self._forget, tokens),
            max(len(row.tokens) for row in rows),
        )
        self._forget(set(tokens) - live)
        failed = {}
        for owner in sorted(live):
            try:
                self.members[owner].course.advance(seen[owner])
            except NonFiniteLossError as error:  # its siblings go on; raised at the end
                logger.error("%s", error)
                failed[owner] = error
        return failed

    def _losses(
        self,
        step: int,
        rows: Sequence[_Row],
        tokens: Mapping[int, int],
        live: set[int],
        token_budget: int,
    ) -> dict[int, StepLoss]:
        """Add up the gradients of a step; return every adapter's loss."""
        losses = dict.fromkeys(tokens, 0.0)
        read: Counter[int] = Counter()
        computed = 0
        for number, (batch, owners) in enumerate(_parts(rows, token_budget)):
            if live.isdisjoint(owners):
                continue
            if self.config.dropout:  # the same after a resume
                torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + number)
            shares = [1 / tokens[owner] for owner in owners]
            for owner, loss in zip(owners, self._gradients(batch, owners, shares), strict=True):
                losses[owner] += loss
            for owner, length in zip(owners, batch.attention_mask.sum(1).tolist(), strict=True):
                read[owner] += length
            computed += batch.input_ids.numel()
        padding = 1 - read.total() / computed if computed else 0.0
        return {
            owner: StepLoss(losses[owner], tokens[owner], read[owner], padding) for owner in tokens
        }

    def _forget(self, owners: Iterable[int]) -> None:
        for owner in owners:
            self.members[owner].course.stand()

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
