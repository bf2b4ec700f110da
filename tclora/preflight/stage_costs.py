"""What the stages of a run cost.

Training is planned by `tclora.preflight.training`. Elsewhere time is floating-point operations over
the rate at which this machine multiplies matrices, less what is lost on the way (`UTILISATION`),
and the start of processes (`START`). A forward pass takes 2 P operations per token for P
parameters; as many carry gradients back to what is fitted.
"""

from dataclasses import dataclass

from tclora.cluster.registry import clusterers
from tclora.config import AdapterConfig, Config
from tclora.jobs.devices import parallel_jobs, visible_gpus
from tclora.library.names import JOINT, cluster_name
from tclora.preflight.models import Models
from tclora.preflight.rates import Rates
from tclora.preflight.sizes import BaseSize, RowCounts, embedder_size
from tclora.preflight.training import START, TrainingPlan, Workload, plan_training, training_slots
from tclora.preflight.training_cost import ACTIVATION_BYTES, Lengths, job_memory

UTILISATION = 0.35  # of the measured rate of matrix products, in evaluation and refits


@dataclass(frozen=True)
class StageCost:
    """What one stage costs.

    Attributes
    ----------
    name : str
        The stage.
    jobs : int
        Processes it starts.
    rows, tokens, steps : int
        Rows and tokens that go through a model, optimiser steps; over all jobs.
    seconds : float
        Duration (s), jobs beside each other as the machine allows.
    memory : float
        Of one job (bytes), beside what Python and its libraries take.
    """

    name: str
    jobs: int
    rows: int
    tokens: int
    steps: int
    seconds: float
    memory: float


class BaseCosts:
    """Costs of the stages that use the base model."""

    def __init__(
        self, config: Config, rows: RowCounts, shape: BaseSize, itemsize: int, rates: Rates
    ) -> None:
        self._config, self._rows, self._shape = config, rows, shape
        self._itemsize = itemsize
        self._rates, self._rate = rates, rates.products * UTILISATION
        self._k = 10 if config.cluster.k == "auto" else int(config.cluster.k)

    def training(self) -> TrainingPlan:
        """Plan the training of all adapters, the clusters' of equal size."""
        train, rows, jobs = self._config.train, self._rows, self._config.resources.jobs
        sizes = {cluster_name(k): rows.train // self._k for k in range(self._k)}
        sizes |= {JOINT: rows.train} if train.joint else {}
        work = Workload(
            sizes, self._shape, train.only(AdapterConfig), self._lengths(),
            slots=training_slots(jobs, parallel_jobs(jobs), train), itemsize=self._itemsize,
        )  # fmt: skip
        return plan_training(train.engine, work, self._rates)

    def train(self, planned: TrainingPlan) -> StageCost:
        """Return the training of all adapters as one stage."""
        jobs = planned.jobs
        rows, tokens = sum(job.rows for job in jobs), sum(job.tokens for job in jobs)
        steps, largest = sum(job.steps for job in jobs), max(job.memory for job in jobs)
        return StageCost("train", len(jobs), rows, tokens, steps, planned.seconds, largest)

    def features(self) -> list[StageCost]:
        """Return what a clusterer asks of the base model."""
        method = self._config.cluster.method
        if method not in clusterers or clusterers[method].features is None:
            return []
        rows, memory = self._rows.train, self._training_memory()
        tokens = int(rows * self._rows.tokens)
        operations = (2 if method == "hidden-states" else 4) * self._shape.parameters * tokens
        return [StageCost("features", 1, rows, tokens, 0, self._seconds(operations, 1), memory)]

    def statistics(self) -> list[StageCost]:
        """Return a look at activations on sample rows, where merges or gates use them."""
        rows = self._k * self._config.merge.sample_rows
        tokens = int(rows * self._rows.tokens)
        if not rows:
            return []
        seconds = self._seconds(2 * self._shape.parameters * tokens, 1)
        return [StageCost("statistics", 1, rows, tokens, 0, seconds, self._forward_memory())]

    def refit(self) -> list[StageCost]:
        """Return the refits of merges, each a job: so many passes over the sample rows."""
        merge = self._config.merge
        jobs, steps = len(merge.refitted), len(merge.refitted) * merge.refit_steps
        rows = (steps + jobs) * self._k * merge.sample_rows  # the last pass tells the loss alone
        if not rows:
            return []
        tokens = int(rows * self._rows.tokens)
        # One after the other, whatever the machine's jobs.
        seconds = 4 * self._shape.parameters * tokens / self._rate + jobs * START
        memory = self._training_memory()
        return [StageCost("refit", jobs, rows, tokens, steps, seconds, memory)]

    def evaluate(self) -> StageCost:
        """Return every method on the held-out rows; standard benchmarks are not counted."""
        cfg = self._config
        methods = 2 + cfg.train.joint + len(cfg.merge.methods) + cfg.route.enabled
        methods += len(cfg.merge.refitted)  # each before the refit too
        rows = methods * self._rows.held_out
        new = cfg.evaluate.max_new_tokens if cfg.evaluate.generate else 0
        tokens = int(rows * (self._rows.tokens + new))
        seconds = self._seconds(2 * self._shape.parameters * tokens, methods)
        return StageCost("evaluate", methods, rows, tokens, 0, seconds, self._forward_memory())

    def _seconds(self, operations: float, jobs: int) -> float:
        return (operations / self._rate + jobs * START) / lanes(self._config, jobs)

    def _lengths(self) -> Lengths:
        return Lengths(self._rows.tokens, self._rows.response)

    def _training_memory(self) -> float:
        train = self._config.train.only(AdapterConfig)
        tokens = train.tokens_at_once()
        return job_memory(self._shape, train, self._lengths(), 1, self._itemsize, tokens)

    def _forward_memory(self) -> float:
        shape, tokens = self._shape, self._config.evaluate.token_budget
        passing = ACTIVATION_BYTES * self._itemsize * tokens * shape.width
        return self._weights() + passing + self._logits(tokens)

    def _weights(self) -> float:
        return self._shape.parameters * self._itemsize

    def _logits(self, tokens: int) -> float:
        """Logits where a response is predicted, and their copy in single precision."""
        share = self._rows.response / self._rows.tokens
        return tokens * share * self._shape.vocabulary * (self._itemsize + 4)


def embed_cost(config: Config, models: Models, rows: RowCounts, rate: float) -> StageCost:
    """Embed all prompts, in this process; nothing where their vectors are given."""
    count = rows.train + rows.held_out
    if config.embed.vectors:
        return StageCost("embed", 0, count, 0, 0, 0.0, 0.0)
    parameters, tokens = embedder_size(models.embedder), int(count * rows.prompt)
    seconds = 2 * parameters * tokens / (rate * UTILISATION)
    return StageCost("embed", 0, count, tokens, 0, seconds, 4.0 * parameters)


def lanes(config: Config, jobs: int) -> int:
    """Return how many jobs run beside each other without sharing a device."""
    at_once = min(jobs, parallel_jobs(config.resources.jobs))
    return max(1, min(at_once, len(visible_gpus()) or 1))
