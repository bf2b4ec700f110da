"""The adapters that a training job holds at once, each in a seat of the model.

Where a job holds fewer at once than it has, whichever has finished leaves its seat to the next. A
seat's weights are of one place in the stacks of `tclora.train.updates`; an adapter that takes it
finds the values it starts from, and no gradient.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from tclora.config import AdapterConfig
from tclora.model.reading import Part, head_among, reading
from tclora.model.tokens import TokenRow
from tclora.train.budget import TokenBudget
from tclora.train.course import Course, hold_out
from tclora.train.lora import A_WEIGHT, fresh_weights
from tclora.train.mixed import MixedLora
from tclora.train.records import Trainee
from tclora.train.team import Team

Weights = dict[str, nn.Parameter]


class Member:
    """An adapter that has a seat.

    Parameters
    ----------
    name : str
        The adapter.
    since : int
        Step of the job at which it took its seat.
    rows : sequence of TokenRow
        All of its rows; read when they are used.
    trained_on : sequence of int
        Which of them it is trained on.
    course : Course
        On its way.

    Attributes
    ----------
    name, since, course
        As given.
    """

    def __init__(
        self,
        name: str,
        since: int,
        rows: Sequence[TokenRow],
        trained_on: Sequence[int],
        course: Course,
    ) -> None:
        self.name = name
        self.since = since
        self.course = course
        self._rows, self._trained_on = rows, trained_on
        self._orders = course.orders(0)

    def next_order(self) -> list[int]:
        """Return which rows its next step takes; none once it is done."""
        return next(self._orders, [])

    def row(self, index: int) -> TokenRow:
        """Read a row of an order."""
        return self._rows[self._trained_on[index]]

    def gone(self, step: int) -> bool:
        """Return whether it had taken its last step before this one of the job."""
        return self.course.done and self.since + len(self.course.history) <= step

    def live(self, step: int) -> bool:
        """Return whether it has not taken this step of the job before a resume."""
        return self.since + len(self.course.history) == step


class Seats:
    """One copy of a model with seats for adapters.

    Parameters
    ----------
    model : PreTrainedModel
        The base; it serves nothing else afterwards.
    trainees : Mapping[str, Trainee]
        All adapters of the job, by name.
    config : AdapterConfig
        Rank and so on; `adapters_at_once` is the number of seats.
    team : Team
        Processes that share the rows.

    Attributes
    ----------
    count : int
        Seats.
    mixed : MixedLora
        The model's adapters by seat.
    read : Reading
        How rows pass through the model.
    budget : TokenBudget
        Of a forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainees: Mapping[str, Trainee],
        config: AdapterConfig,
        team: Team,
    ) -> None:
        self.count = config.held_at_once(len(trainees))
        self._model, self._trainees, self._config, self._team = model, trainees, config, team
        seeds = sorted({trainee.init_seed for trainee in trainees.values()})
        self._fresh = {seed: _values(fresh_weights(model, config, seed)) for seed in seeds}
        self._waiting = Counter(trainee.init_seed for trainee in trainees.values())
        self._weights = list(self._empty(seeds, model.device))
        self.mixed = MixedLora(model, self._weights, scaling=config.scaling, dropout=config.dropout)
        self.read = reading(
            model,
            max(len(row) for trainee in trainees.values() for row in trainee.rows),
            head_trained=head_among(model, self.mixed.modules),
        )
        self.budget = TokenBudget(config.tokens_at_once(gpu=model.device.type == "cuda"))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def _empty(self, seeds: Sequence[int], device: torch.device) -> Iterator[Weights]:
        """Yield the weights of each seat; all share an A that is not trained where they can."""
        start = self._fresh[seeds[0]]
        fixed = {name for name in start if self._config.freeze_a and name.endswith(A_WEIGHT)}
        common: Weights = {}
        for _ in range(self.count):
            own = {
                name: nn.Parameter(value.to(device, copy=True), requires_grad=name not in fixed)
                for name, value in start.items()
                if name not in common
            }
            if len(seeds) == 1:
                common |= {name: own[name] for name in fixed & own.keys()}
            own |= common
            yield {name: own[name] for name in start}

    def take(self, seat: int, name: str, step: int) -> Member:
        """Begin or resume the course of an adapter in an empty seat, at a step of the job."""
        trainee, config = self._trainees[name], self._config
        weights, fresh = self._weights[seat], self._fresh[trainee.init_seed]
        for key, weight in weights.items():
            weight.detach().copy_(fresh[key])
        self._waiting[trainee.init_seed] -= 1
        if not self._waiting[trainee.init_seed]:
            del self._fresh[trainee.init_seed]
        kept, held = hold_out(len(trainee.rows), config.validation_fraction, trainee.seed)
        watched = [trainee.rows[place] for place in held]
        course = Course(
            weights,
            len(kept),
            config,
            seed=trainee.seed,
            destination=trainee.destination,
            validate=partial(self._validate, seat, watched) if watched else None,
        )
        return Member(name, step, trainee.rows, kept, course)

    def _validate(self, seat: int, rows: Sequence[TokenRow]) -> float:
        """Return the mean loss on rows held out, nats per response token."""
        own = self._team.share(rows, [len(row) for row in rows])

        def summed(tokens: int) -> float:
            total = 0.0
            for part in self.read.parts(own, tokens):
                with self.mixed.rows([seat] * len(part.rows), part.lengths):
                    total += float(self.read.losses(part).sum())
            return total

        self._model.eval()
        with torch.no_grad():  # which leaves nothing to undo
            total = self.budget.within(summed, lambda: None, max(map(len, own), default=0))
        self._model.train()
        (total,) = self._team.sums([total])
        return total / sum(len(row.response) for row in rows)

    def gradients(self, part: Part, seats: Sequence[int], shares: Sequence[float]) -> list[float]:
        """Add to the gradients of all adapters in a part; return each row's part of the loss."""
        with self.mixed.rows(seats, part.lengths):
            losses = self.read.losses(part)  # (rows,)
            losses = losses * torch.tensor(shares, device=losses.device)
            losses.sum().backward()
        found: list[float] = losses.tolist()
        return found


def _values(weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return what adapters start from, where it takes none of a GPU's memory."""
    return {name: weight.detach().cpu() for name, weight in weights.items()}
