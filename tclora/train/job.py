"""The loop of a training job: one or several adapters at once, on one copy of the base model.

A part, what passes through the model at once, mixes rows of several adapters up to the token
budget, so that short steps fill it too. What belongs to one adapter stays its own: row order, loss,
gradient, clipping, schedule, number of steps, validation, checkpoints. Adapters that have finished
or whose loss is no number any more leave; the others go on, and where a job holds fewer at once
than it has (`adapters_at_once`), the next takes the empty seat.

The loop is ours because it needs what trainers do not give: logits only at supervised positions,
steps split to a token budget, low-precision adapters with fp32 master weights on CPU, and
checkpoints in safe formats. Which rows share a part follows from the trainees alone. A resume goes
through all steps of the job again, without computing those that every adapter has taken; then the
rows of those ahead keep their places until the others have caught up, without effect on their
adapters. So every adapter ends with the same bytes as without the interruption, given as many
threads. On a GPU it ends close to them: attention's gradients add up in no fixed order there, and
parts may be smaller where memory lacked.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.errors import JobError, NonFiniteLossError
from tclora.model.tokens import TokenRow
from tclora.train.course import peak_memory
from tclora.train.records import StepLoss, Trainee, TrainingResult
from tclora.train.seats import Member, Seats
from tclora.train.team import Team

logger = logging.getLogger(__name__)


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
    seats = Seats(model, trainees, config, team)
    with seats.read.ready():
        model.train()
        results = _Job(seats, trainees, config, team).run()
    return {name: results[name] for name in trainees}


class _Row(NamedTuple):
    """A row of the current step with the seat of the adapter it belongs to."""

    seat: int
    tokens: TokenRow


class _Computed(NamedTuple):
    """Losses by seat; tokens and positions that went through the model."""

    losses: dict[int, float]
    tokens: int
    positions: int


class _Job:
    """All adapters of a job, and what trains them."""

    def __init__(
        self, seats: Seats, trainees: Mapping[str, Trainee], config: AdapterConfig, team: Team
    ) -> None:
        self._seats, self._config, self._team = seats, config, team
        names = sorted(trainees)  # their order in a part must not depend on that of the trainees
        self._seed = trainees[names[0]].seed  # of dropout
        if seats.count < len(names):  # the longest first, so that none is left alone at the end
            names.sort(key=lambda name: -len(trainees[name].rows))
        self._waiting = deque(names)
        self._seated: dict[int, Member] = {}

    def run(self) -> dict[str, TrainingResult]:
        """Take all steps of all adapters; return the results by name."""
        results: dict[str, TrainingResult] = {}
        failures: list[str] = []
        for step in count():
            results |= self._leave(step)
            self._fill(step)
            if not self._seated:
                break
            orders = {seat: self._seated[seat].next_order() for seat in sorted(self._seated)}
            if any(member.live(step) for member in self._seated.values()):
                rows = [
                    _Row(seat, self._seated[seat].row(index))
                    for seat, order in orders.items()
                    for index in order
                ]
                failures += self._step(step, rows)
        if failures:
            self._team.wait()  # until the others' files are written
            raise NonFiniteLossError("; ".join(failures))
        return results

    def _leave(self, step: int) -> dict[str, TrainingResult]:
        """Write the adapters that have taken their last step, and empty their seats."""
        gone = [seat for seat, member in self._seated.items() if member.gone(step)]
        members = map(self._seated.pop, gone)
        return {member.name: member.course.finish() for member in members}

    def _fill(self, step: int) -> None:
        """Give empty seats to those that wait."""
        empty = [seat for seat in range(self._seats.count) if seat not in self._seated]
        taken = list(zip(empty, self._waiting, strict=False))
        for seat, name in taken:
            self._waiting.popleft()
            self._seated[seat] = self._seats.take(seat, name, step)
        known = [len(self._seated[seat].course.history) for seat, _ in taken]
        if known and not self._team.agrees(known):
            raise JobError(
                "all processes of a training must go on from the same steps, but one could not "
                "read a checkpoint; run again"
            )

    def _step(self, step: int, rows: Sequence[_Row]) -> list[str]:
        """Take a step with every adapter that has not taken it before a resume; say what broke."""
        tokens: Counter[int] = Counter()
        read: Counter[int] = Counter()
        for row in rows:
            tokens[row.seat] += len(row.tokens.response)
            read[row.seat] += len(row.tokens)
        live = {seat for seat in tokens if self._seated[seat].live(step)}
        team, mixed, budget = self._team, self._seats.mixed, self._seats.budget
        own = team.share(rows, [len(row.tokens) for row in rows])
        compute = partial(self._losses, step, own, tokens, live)
        forget = partial(self._forget, tokens)
        longest = max((len(row.tokens) for row in own), default=0)
        found = budget.within(compute, forget, longest)
        if mixed.stacked and len(tokens) > 1 and not mixed.finite():
            forget()
            with mixed.apart():  # so that it stays with the adapter it comes from
                found = budget.within(compute, forget, longest)
        team.add_up(mixed.gradients)
        *losses, held, computed = team.sums([*found.losses.values(), found.tokens, found.positions])
        padding, memory = 1 - held / computed if computed else 0.0, peak_memory()
        seen = {
            seat: StepLoss(loss, tokens[seat], read[seat], padding, memory)
            for seat, loss in zip(found.losses, losses, strict=True)
        }
        self._forget(set(tokens) - live)
        failures = []
        for seat in sorted(live):
            try:
                self._seated[seat].course.advance(seen[seat])
            except NonFiniteLossError as error:  # its siblings go on; raised at the end
                logger.error("%s", error)
                failures.append(str(error))
                self._forget([seat])  # nothing of it is left for the others' steps
                del self._seated[seat]
        return failures

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
        groups = [row.seat for row in rows]
        parts = self._seats.read.parts([row.tokens for row in rows], token_budget, groups)
        for number, part in enumerate(parts):
            seats = [groups[index] for index in part.rows]
            if live.isdisjoint(seats):
                continue
            if self._config.dropout:  # the same after a resume
                seed = (self._seed * 1_000_003 + step) * 1_009 + number
                torch.manual_seed(seed * self._team.size + self._team.rank)
            shares = [1 / tokens[seat] for seat in seats]
            for seat, loss in zip(seats, self._seats.gradients(part, seats, shares), strict=True):
                losses[seat] += loss
            read, computed = read + part.tokens, computed + part.positions
        return _Computed(losses, read, computed)

    def _forget(self, seats: Iterable[int]) -> None:
        for seat in seats:
            self._seated[seat].course.stand()
