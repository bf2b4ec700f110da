"""What a run would cost, before it starts: what is fetched, rows, tokens, steps, time and memory.

Time is floating-point operations over the rate at which this machine multiplies matrices, less what
is lost on the way (`UTILISATION`), and the start of processes (`START`). A forward pass takes 2 P
operations per token for P parameters; as many carry gradients back to the adapters (those of the
base's weights are not formed), and as many again recompute activations where that is asked for.
Memory of a training job is its weights, the adapter with gradients and optimiser state, the
activations of one forward pass, and its logits.

Further training seeds repeat all that follows the clusters (`seeds`).

Not covered: downloads' time, generated tokens beyond their operations (a GPU spends more on reading
weights), merging and factorising (minutes at most, see ``benchmarks/results/large_library.md``),
and the stages that `uncovered` names.

Symbols: P parameters, L layers, d hidden width, T tokens per forward pass.

References
----------
.. [1] Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022
   (34 d bytes per token and layer at 16 bits).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tclora.cluster.registry import clusterers
from tclora.config import Config, GateConfig, TrainConfig
from tclora.data.demo import DEMO
from tclora.jobs.devices import parallel_jobs, visible_gpus
from tclora.model.locate import BUILTIN_BASE, BUILTIN_EMBEDDER, choose_dtype, default_device
from tclora.preflight.models import Models
from tclora.preflight.sizes import BaseSize, RowCounts, base_size, count_rows, embedder_size
from tclora.train.course import total_steps

UTILISATION = 0.35  # of the measured rate of matrix products, in training and evaluation
START = 6.0  # of a job: imports and loading a small model (s)
_ACTIVATION_BYTES = 17  # per token, layer, hidden unit and byte of the weights' type
_ADAPTER_BYTES = 16  # per parameter beside its copy in the model: master, gradient, two moments


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
    """

    fetched: tuple[str, ...]
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]


def make_plan(config: Config, models: Models, rate: float | None = None) -> Plan:
    """Plan a run whose configuration has been checked.

    Parameters
    ----------
    config : Config
        The run.
    models : Models
        Where its models are.
    rate : float, optional
        Operations per second of one job's device; measured here by default.

    Raises
    ------
    DataError
        If the data are a dataset of the hub and no limit says how many rows it gives.
    """
    rows = count_rows(config, models)
    dtype = choose_dtype(config.train.dtype, default_device())
    measured = rate or matmul_rate(dtype)
    cost = _Costs(config, rows, base_size(models.base, config.train), dtype.itemsize, measured)
    stages = [_embed(config, models, rows, measured), *cost.features()]
    repeated = [cost.train(), *cost.statistics(), *cost.refit(), cost.evaluate()]
    stages += [_times(stage, config.seeds) for stage in repeated]
    source = "given" if rate else f"measured here in {str(dtype).removeprefix('torch.')}"
    assumptions = (
        rows.source,
        f"{measured / 1e12:.3g} TFLOP/s per job ({source}), {UTILISATION:.0%} of it used",
        f"{_lanes(config, 1000)} at once that do not slow each other, {START:g} s to start each",
        *([f"{config.seeds} training seeds, one after the other"] if config.seeds > 1 else []),
        *(f"not covered: {name}" for name in uncovered(config)),
    )
    return Plan(tuple(fetched(config)), tuple(stages), assumptions)


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


def matmul_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measure operations per second of matrix products on this process's device."""
    device = default_device()
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    done, begin = 0, 0.0
    for number in range(1_000_000):
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        if number == 0:  # the first prepares
            begin = time.perf_counter()
        else:
            done += 1
            if time.perf_counter() - begin > seconds:
                break
    return 2 * size**3 * done / (time.perf_counter() - begin)


class _Costs:
    """Costs of the stages that use the base model."""

    def __init__(
        self, config: Config, rows: RowCounts, shape: BaseSize, itemsize: int, rate: float
    ) -> None:
        self._config, self._rows, self._shape = config, rows, shape
        self._itemsize = itemsize
        self._rate = rate * UTILISATION
        self._k = 10 if config.cluster.k == "auto" else int(config.cluster.k)

    def train(self) -> StageCost:
        """Return the training of all adapters, the clusters' of equal size."""
        train, jobs = self._config.train, self._k + self._config.train.joint
        parts = [self._rows.train // self._k] * self._k
        parts += [self._rows.train] * train.joint
        steps = [total_steps(max(1, part), train) for part in parts]
        tokens = int(sum(steps) * train.batch_size * self._rows.tokens)
        passes = 6 if train.gradient_checkpointing else 4
        seconds = self._seconds(passes * self._shape.parameters * tokens, jobs)
        # One long job, the joint adapter's, cannot be shared out.
        longest = max(steps) / sum(steps) * seconds * _lanes(self._config, jobs)
        trained = sum(steps) * train.batch_size
        return StageCost("train", jobs, trained, tokens, sum(steps), max(seconds, longest),
                         self._training_memory(train))  # fmt: skip

    def features(self) -> list[StageCost]:
        """Return what a clusterer asks of the base model."""
        method = self._config.cluster.method
        if method not in clusterers or clusterers[method].features is None:
            return []
        rows, memory = self._rows.train, self._training_memory(self._config.train)
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
        memory = self._training_memory(self._config.train)
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

    def _training_memory(self, train: TrainConfig) -> float:
        shape, tokens = self._shape, train.tokens_per_forward
        layers = 1 if train.gradient_checkpointing else shape.layers
        activations = _ACTIVATION_BYTES * self._itemsize * tokens * shape.width * layers
        if train.gradient_checkpointing:
            activations += self._itemsize * tokens * shape.width * shape.layers
        return self._weights() + self._adapter() + activations + self._logits(tokens)

    def _forward_memory(self) -> float:
        shape, tokens = self._shape, self._config.evaluate.token_budget
        passing = _ACTIVATION_BYTES * self._itemsize * tokens * shape.width
        return self._weights() + passing + self._logits(tokens)

    def _weights(self) -> float:
        return self._shape.parameters * self._itemsize

    def _adapter(self) -> float:
        return self._shape.trained * (_ADAPTER_BYTES + self._itemsize)

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
