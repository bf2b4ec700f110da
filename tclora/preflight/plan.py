"""What a run would cost, before it starts: what is fetched, rows, tokens, steps, time and memory.

Training is planned by `tclora.preflight.training`. Elsewhere time is floating-point operations
over the rate at which this machine multiplies matrices, less what is lost on the way
(`UTILISATION`), and the start of processes (`START`). A forward pass takes 2 P operations per token
for P parameters; as many carry gradients back to what is fitted.

Further training seeds repeat all that follows the clusters (`seeds`).

Not covered: downloads' time, generated tokens beyond their operations (a GPU spends more on reading
weights), merging and factorising (minutes at most, see ``benchmarks/results/large_library.md``),
and the stages that `uncovered` names.

Symbols: P parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tclora.cluster.registry import clusterers
from tclora.config import AdapterConfig, Config, GateConfig
from tclora.data.demo import DEMO
from tclora.jobs.devices import parallel_jobs, visible_gpus
from tclora.library.names import JOINT, cluster_name
from tclora.model.locate import BUILTIN_BASE, BUILTIN_EMBEDDER, choose_dtype, default_device
from tclora.preflight.models import Models
from tclora.preflight.rates import Rates, measured_rates
from tclora.preflight.sizes import BaseSize, RowCounts, base_size, count_rows, embedder_size
from tclora.preflight.steps import LAST, STEPS
from tclora.preflight.training import (
    START,
    JobCost,
    TrainingPlan,
    Workload,
    plan_training,
    training_slots,
)
from tclora.preflight.training_cost import ACTIVATION_BYTES, Lengths, job_memory

_STEP_OF = {
    "embed": "prepare", "features": "prepare", "train": "train", "statistics": "merge",
    "refit": "merge", "evaluate": "evaluate",
}  # fmt: skip
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


@dataclass(frozen=True)
class Plan:
    """What a run would cost.

    Attributes
    ----------
    fetched : tuple of str
        What comes from the Hugging Face hub, unless its cache has it.
    stages : tuple of StageCost
        In their order.
    assumptions : tuple of str
        What the figures rest on.
    training : tuple of JobCost
        The jobs of the stage that trains, in their order.
    device : str
        What each of them runs on.
    """

    fetched: tuple[str, ...]
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]
    training: tuple[JobCost, ...]
    device: str


def make_plan(config: Config, models: Models, rate: float | None = None, until: str = LAST) -> Plan:
    """Plan a run whose configuration has been checked.

    Parameters
    ----------
    config : Config
        The run.
    models : Models
        Where its models are.
    rate : float, optional
        Operations per second of one job's device; measured here by default.
    until : str
        Last step; see `tclora.preflight.steps`.

    Raises
    ------
    DataError
        If the data are a dataset of the hub and no limit says how many rows it gives.
    """
    rows = count_rows(config, models)
    dtype = choose_dtype(config.train.dtype, default_device())
    rates = Rates.given(rate) if rate else measured_rates(dtype)
    measured = rates.products
    cost = _Costs(config, rows, base_size(models.base, config.train), dtype.itemsize, rates)
    stages = [_embed(config, models, rows, measured), *cost.features()]
    training = cost.training()
    repeated = [cost.train(training), *cost.statistics(), *cost.refit(), cost.evaluate()]
    done = STEPS[: STEPS.index(until) + 1]
    seeds = config.seeds if "evaluate" in done else 1  # further ones follow the merge
    stages += [_times(stage, seeds) for stage in repeated]
    stages = [stage for stage in stages if _STEP_OF[stage.name] in done]
    source = "given" if rate else f"measured here in {str(dtype).removeprefix('torch.')}"
    assumptions = (
        rows.source,
        *([training.reason] if training.reason else []),
        f"{measured / 1e12:.3g} TFLOP/s per job ({source}), {UTILISATION:.0%} of it used outside "
        "of training",
        f"{_lanes(config, 1000)} at once that do not slow each other, {START:g} s to start each",
        *([f"until the step {until}"] if until != LAST else []),
        *([f"{seeds} training seeds, one after the other"] if seeds > 1 else []),
        *(f"not covered: {name}" for name in uncovered(config)),
    )
    jobs = training.jobs if "train" in done else ()
    return Plan(
        tuple(fetched(config)),
        tuple(stages),
        assumptions,
        jobs,
        _device(config.train.data_parallel),
    )


def fetched(config: Config) -> Iterator[str]:
    """Yield what a run would take from the Hugging Face hub, unless its cache has it."""
    data = config.data
    named: dict[str, tuple[str | None, set[str | None]]] = {
        "base model": (config.base_model, {BUILTIN_BASE}),
        "embedding model": (config.embed.model, {BUILTIN_EMBEDDER, BUILTIN_BASE}),
        "data": (data.path, {DEMO}),
        "test data": (data.test_path, {None}),
        "out-of-domain data": (data.ood_path, {None}),
        "composition data": (data.composition_path, {None}),
    }
    for kind, (value, here) in named.items():
        if value not in here and not Path(str(value)).exists():
            yield f"{kind} {value}"
    yield from (f"lm-eval task {task}" for task in config.evaluate.lm_eval)


def uncovered(config: Config) -> Iterator[str]:
    """Yield the stages of a run that look at the base model and that a plan leaves out."""
    merge, route = config.merge, config.route
    named = {
        "the choice of scales (merge.scales)": bool(merge.scales),
        "the search for the CP rank (factorise.target_recovery)": (
            config.factorise.target_recovery is not None
        ),
        "the calibration of fallback and abstention (route.calibration_rows)": (
            route.enabled
            and route.calibration_rows > 0
            and any(value is None for value in dict(route.only(GateConfig)).values())
        ),
        "rows under every adapter (evaluate.cross_rows)": config.evaluate.cross_rows > 0,
        "lm-eval's tasks (evaluate.lm_eval)": bool(config.evaluate.lm_eval),
    }
    yield from (name for name, counts in named.items() if counts)


def _times(stage: StageCost, seeds: int) -> StageCost:
    """Return the cost of a stage that is run with several seeds, one after the other."""
    counts = {name: seeds * getattr(stage, name) for name in ("jobs", "rows", "tokens", "steps")}
    return replace(stage, **counts, seconds=seeds * stage.seconds)


class _Costs:
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
        return (operations / self._rate + jobs * START) / _lanes(self._config, jobs)

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


def _embed(config: Config, models: Models, rows: RowCounts, rate: float) -> StageCost:
    """Embed all prompts, in this process; nothing where their vectors are given."""
    count = rows.train + rows.held_out
    if config.embed.vectors:
        return StageCost("embed", 0, count, 0, 0, 0.0, 0.0)
    parameters, tokens = embedder_size(models.embedder), int(count * rows.prompt)
    seconds = 2 * parameters * tokens / (rate * UTILISATION)
    return StageCost("embed", 0, count, tokens, 0, seconds, 4.0 * parameters)


def _lanes(config: Config, jobs: int) -> int:
    """Return how many jobs run beside each other without sharing a device."""
    at_once = min(jobs, parallel_jobs(config.resources.jobs))
    return max(1, min(at_once, len(visible_gpus()) or 1))


def _device(processes: int) -> str:
    if not visible_gpus():
        return "CPU"
    return "one GPU" if processes == 1 else f"{processes} GPUs"
