"""The loop of a training job: one or several adapters at once, on one copy of the base model.

A part, what passes through the model at once, mixes rows of several adapters up to the token
budget, so that short steps fill it too. What belongs to one adapter stays its own: row order, loss,
gradient, clipping, schedule, number of steps, validation, checkpoints. Adapters that have finished
or whose loss is no number any more leave; the others go on.

The loop is ours because it needs what trainers do not give: logits only at supervised positions,
steps split to a token budget, low-precision adapters with fp32 master weights on CPU, and
checkpoints in safe formats. Which rows share a part follows from the trainees alone. After a resume
with adapters at unequal steps, the rows of those ahead keep their places until the others have
caught up, without effect on their adapters; so every adapter ends with the same bytes as without
the interruption, given as many threads. On a GPU it ends close to them: attention's gradients add
up in no fixed order there, and parts may be smaller where memory lacked.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.errors import JobError, NonFiniteLossError
from tclora.model.reading import Part, Reading, reading
from tclora.model.tokens import TokenRow
from tclora.train.budget import TokenBudget
from tclora.train.course import Course, hold_out, peak_memory
from tclora.train.lora import fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.records import Destination, StepLoss, TrainingResult
from tclora.train.team import Team

logger = logging.getLogger(__name__)
Weights = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Trainee:
    """An adapter to train.

    Attributes
    ----------
    rows : sequence of TokenRow
        At least one.
    seed, init_seed : int
        Seeds of the row order and dropout, and of A_0.
    destination : Destination
        Where checkpoints, records and the adapter go.
    """

    rows: Sequence[TokenRow]
    seed: int
    init_seed: int
    destination: Destination


def train_side_by_side(
    model: PreTrainedModel,
    trainees: Mapping[str, Trainee],
    config: AdapterConfig,
    team: Team = Team(),  # noqa: B008  # frozen
) -> dict[str, TrainingResult]:
    """Train adapters on one model and write them as stock PEFT directories.

    Parameters
    ----------
    model : PreTrainedModel
        The base in evaluation mode; it serves nothing else afterwards.
    trainees : Mapping[str, Trainee]
        By name, at least one. Their order makes no difference.
    config : AdapterConfig
        Rank, learning rate, batch and so on, the same for all.
    team : Team
        Processes that train the same adapters on the same rows, this one among them.

    Returns
    -------
    dict of str to TrainingResult
        In the order of the trainees.

    Raises
    ------
    ModelError
        If the target modules match nothing in the model, or if one row alone exceeds the device's
        memory.
    NonFiniteLossError
        Once the others are finished, if the loss of an adapter became NaN or infinite.
    """
    names = sorted(trainees)  # their order in a part must not depend on that of the trainees
    weights = _weights(model, config, [trainees[name].init_seed for name in names])
    mixed = MixedLora(model, weights, scaling=config.scaling, dropout=config.dropout)
    head = model.get_output_embeddings()
    read = reading(
        model,
        max(len(row) for trainee in trainees.values() for row in trainee.rows),
        head_trained=any(model.get_submodule(path) is head for path in mixed.modules),
    )
    budget = TokenBudget(config.tokens_at_once(gpu=model.device.type == "cuda"))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with read.ready():
        model.train()
        place = _Place(model, read, mixed, config, budget, team)
        members = [
            place.member(owner, name, trainees[name], weights[owner])
            for owner, name in enumerate(names)
        ]
        results = _Job(place, members, trainees[names[0]].seed).run()
    return {name: results[name] for name in trainees}


def _weights(
    model: PreTrainedModel, config: AdapterConfig, init_seeds: Sequence[int]
) -> list[Weights]:
    """Return fresh weights per adapter; those of equal seed share an A that is not trained."""
    fresh = {seed: fresh_weights(model, config, seed) for seed in sorted(set(init_seeds))}
    if config.freeze_a:
        for own in fresh.values():
            for name, weight in own.items():
                weight.requires_grad_(".lora_A." not in name)
    return [
        {
            name: nn.Parameter(weight.detach().clone()) if weight.requires_grad else weight
            for name, weight in fresh[seed].items()
        }
        for seed in init_seeds
    ]


class _Member(NamedTuple):
    name: str
    rows: Sequence[TokenRow]
    trained_on: Sequence[int]  # which of the rows
    course: Course


class _Row(NamedTuple):
    """A row of the current step with the adapter it belongs to."""

    owner: int
    tokens: TokenRow


class _Place(NamedTuple):
    """Where the adapters of a job are trained."""

    model: PreTrainedModel
    read: Reading
    mixed: MixedLora
    config: AdapterConfig
    budget: TokenBudget
    team: Team

    def member(self, owner: int, name: str, trainee: Trainee, weights: Weights) -> _Member:
        """Begin or resume the course of one adapter."""
        rows = trainee.rows
        kept, held = hold_out(len(rows), self.config.validation_fraction, trainee.seed)
        watched = [rows[place] for place in held]
        course = Course(
            weights,
            len(kept),
            self.config,
            seed=trainee.seed,
            destination=trainee.destination,
            validate=partial(self._validate, owner, watched) if watched else None,
        )
        return _Member(name, rows, kept, course)

    def _validate(self, owner: int, rows: Sequence[TokenRow]) -> float:
        """Return the mean loss on rows held out, nats per response token."""
        own = self.team.share(rows, [len(row) for row in rows])

        def summed(tokens: int) -> float:
            total = 0.0
            for part in self.read.parts(own, tokens):
                with self.mixed.rows([owner] * len(part.rows), part.lengths):
                    total += float(self.read.losses(part).sum())
            return total

        self.model.eval()
        with torch.no_grad():  # which leaves nothing to undo
            total = self.budget.within(summed, lambda: None, max(map(len, own), default=0))
        self.model.train()
        (total,) = self.team.sums([total])
        return total / sum(len(row.response) for row in rows)

    def gradients(
        self, part: Part, owners: Sequence[int], shares: Sequence[float]
    ) -> Sequence[float]:
        """Add to the gradients of all adapters in a part; return each row's part of the loss."""
        with self.mixed.rows(owners, part.lengths):
            losses = self.read.losses(part)  # (rows,)
            losses = losses * torch.tensor(shares, device=losses.device)
            losses.sum().backward()
        found: list[float] = losses.tolist()
        return found


class _Computed(NamedTuple):
    """Losses by adapter; tokens and positions that went through the model."""

    losses: dict[int, float]
    tokens: int
    positions: int


class _Job(NamedTuple):
    """All adapters of a job, and what trains them."""

    place: _Place
    members: Sequence[_Member]
    seed: int  # of dropout

    def run(self) -> dict[str, TrainingResult]:
        """Take all steps of all adapters; return the results by name."""
        courses = [member.course for member in self.members]
        if not self.place.team.agrees([len(course.history) for course in courses]):
            raise JobError(
                "all processes of a training must go on from the same steps, but one could not "
                "read a checkpoint; run again"
            )
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
                _Row(owner, member.rows[member.trained_on[index]])
                for owner, (member, order) in enumerate(zip(self.members, orders, strict=True))
                if owner not in failed
                for index in next(order, ())
            ]
            if rows:
                failed |= self._step(step, rows)
        if failed:
            self.place.team.wait()  # until the others' files are written
            raise NonFiniteLossError("; ".join(str(error) for error in failed.values()))
        return results

    def _step(self, step: int, rows: Sequence[_Row]) -> dict[int, NonFiniteLossError]:
        """Take a step with every adapter that has not taken it before a resume."""
        tokens: Counter[int] = Counter()
        read: Counter[int] = Counter()
        for row in rows:
            tokens[row.owner] += len(row.tokens.response)
            read[row.owner] += len(row.tokens)
        live = {owner for owner in tokens if len(self.members[owner].course.history) == step}
        team, mixed = self.place.team, self.place.mixed
        own = team.share(rows, [len(row.tokens) for row in rows])
        compute = partial(self._losses, step, own, tokens, live)
        forget = partial(self._forget, tokens)
        longest = max((len(row.tokens) for row in own), default=0)
        found = self.place.budget.within(compute, forget, longest)
        if mixed.stacked and len(tokens) > 1 and not mixed.finite():
            forget()
            with mixed.apart():  # so that it stays with the adapter it comes from
                found = self.place.budget.within(compute, forget, longest)
        team.add_up(mixed.gradients)
        *losses, held, computed = team.sums([*found.losses.values(), found.tokens, found.positions])
        padding, memory = 1 - held / computed if computed else 0.0, peak_memory()
        seen = {
            owner: StepLoss(loss, tokens[owner], read[owner], padding, memory)
            for owner, loss in zip(found.losses, losses, strict=True)
        }
        self._forget(set(tokens) - live)
        failed = {}
        for owner in sorted(live):
            try:
                self.members[owner].course.advance(seen[owner])
            except NonFiniteLossError as error:  # its siblings go on; raised at the end
                logger.error("%s", error)
                failed[owner] = error
                self.members[owner].course.stand()  # nothing of it is left for the others' steps
        return failed

    def _losses(
        self,
        step: int,
        rows: Sequence[_Row],
        tokens: Mapping[int, int],
        live: set[int],
        token_budget: int,
    ) -> _Computed:
        """Add up the gradients of this process's rows of a step; return every adapter's loss."""
        losses = dict.fromkeys(tokens, 0.0)
        read = computed = 0
        groups = [row.owner for row in rows]
        parts = self.place.read.parts([row.tokens for row in rows], token_budget, groups)
        for number, part in enumerate(parts):
            owners = [groups[index] for index in part.rows]
            if live.isdisjoint(owners):
                continue
            if self.place.config.dropout:  # the same after a resume
                seed = (self.seed * 1_000_003 + step) * 1_009 + number
                torch.manual_seed(seed * self.place.team.size + self.place.team.rank)
            shares = [1 / tokens[owner] for owner in owners]
            for owner, loss in zip(owners, self.place.gradients(part, owners, shares), strict=True):
                losses[owner] += loss
            read, computed = read + part.tokens, computed + part.positions
        return _Computed(losses, read, computed)

    def _forget(self, owners: Iterable[int]) -> None:
        for owner in owners:
            self.members[owner].course.stand()
