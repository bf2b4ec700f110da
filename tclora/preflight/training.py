"""What training costs: time and memory of every job, and which engine `auto` stands for.

Time of a job of S optimiser steps over N tokens, a share s of them supervised, in rows of T:

    N (4 P + 6 Q + 4 V d s + 14 T d L) / products
    + 2.4 (N (L (41 d + 10 f) + 3 Q / r) + 25 Q S) / elements
    + 0.014 L max(N / F, steps of the job)

The first line is what matrix products need: forward pass and gradients of activations of the
linear layers, all three products of the adapters, the output layer where a response token is
predicted, and attention. The second counts passes over activations (as `tclora.model.kernels` makes
them, forward and backward) and over an adapter's weights in its optimiser; the third the calls of
operators, per layer and forward pass. The factors 2.4 and 0.014 were fitted on trainings of SmolLM2
and of two smaller Llamas in fp32 and bf16 on two cores with AMX; ``benchmarks/training_cost.py``
holds the whole against measured trainings. It was not measured on a GPU.

Memory is the weights, every adapter with gradients and optimiser state, the activations of one
forward pass, and its logits.

Symbols: P weights of the linear layers, Q of an adapter, r its rank, L layers, d width, f inner
width, V vocabulary, F tokens per forward pass.

References
----------
.. [1] Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022
   (34 d bytes per token and layer at 16 bits).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tclora.config import AdapterConfig
from tclora.jobs.devices import visible_gpus
from tclora.model.quantised import NF4_BYTES
from tclora.preflight.rates import Rates
from tclora.preflight.sizes import BaseSize
from tclora.train.course import total_steps
from tclora.train.engines import engines

START = 6.0  # of a job: imports and loading a small model (s)
AUTO = ("separate", "together")  # what the engine `auto` chooses from
ACTIVATION_BYTES = 17  # per token, layer, hidden unit and byte of the weights' type
_LOGITS = 2048  # positions whose logits are held at once
_MODULES = 7  # of a layer, that adapters update
_ADAPTER_BYTES = 16  # per weight beside its copy in the model: master, gradient, two moments
_PASSES = 2.4  # of a real pass over activations, in passes as `Rates.elements` measures them
_CALLS = 14e-3  # of operators, per layer and forward pass with its backward pass (s)
_LEAST_TOKENS = 1024  # per forward pass, that a GPU of little memory is planned with
NOMINAL = Rates.given(1e11)  # a choice must not follow what else the machine does


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row, and of its response."""

    row: float
    response: float


@dataclass(frozen=True)
class JobCost:
    """What one training job costs.

    Attributes
    ----------
    names : tuple of str
        Its adapters.
    rows, tokens, steps : int
        Rows and tokens that are trained on, repetitions counted; optimiser steps of all adapters.
    seconds : float
        Alone on its devices, with its start; those of a team share the work evenly.
    loop : float
        Its loop beside the others that run at once (s).
    memory : float
        Bytes, beside what Python and its libraries take.
    """

    names: tuple[str, ...]
    rows: int
    tokens: int
    steps: int
    seconds: float
    loop: float
    memory: float


@dataclass(frozen=True)
class TrainingPlan:
    """The training of all adapters by one engine.

    Attributes
    ----------
    engine : str
        Its name.
    jobs : tuple of JobCost
        In the order in which they start.
    seconds : float
        Until the last has ended.
    memory : float
        Of all jobs that share a device or the machine at once (bytes).
    reason : str
        Why this engine; empty where it was named.
    """

    engine: str
    jobs: tuple[JobCost, ...]
    seconds: float
    memory: float
    reason: str = ""

    @property
    def adapters(self) -> dict[str, float]:
        """Adapter → seconds of the loop that trains it, beside other jobs."""
        return {name: job.loop for job in self.jobs for name in job.names}


@dataclass(frozen=True)
class Workload:
    """Adapters to train, and where.

    Attributes
    ----------
    sizes : Mapping[str, int]
        Adapter → rows.
    base : BaseSize
        The base model.
    config : AdapterConfig
        Rank, batch, steps and so on.
    lengths : Lengths
        Of the rows.
    slots : int
        Jobs that run at once.
    itemsize : int
        Bytes of one of the base's weights.
    """

    sizes: Mapping[str, int]
    base: BaseSize
    config: AdapterConfig
    lengths: Lengths
    slots: int
    itemsize: int


def plan_training(engine: str, work: Workload, rates: Rates = NOMINAL) -> TrainingPlan:
    """Plan the training of adapters.

    Parameters
    ----------
    engine : str
        A registered engine, or ``"auto"``: of `AUTO` the faster one of those that fit the memory.
    work : Workload
        The adapters.
    rates : Rates
        Of one GPU, or of all cores.
    """
    if engine != "auto":
        return _planned(engine, work, rates)
    tried = [_planned(name, work, NOMINAL) for name in AUTO]
    room = device_memory()
    fitting = [plan for plan in tried if plan.memory <= room] or [
        min(tried, key=lambda plan: plan.memory)
    ]
    chosen = min(fitting, key=lambda plan: (plan.seconds, plan.memory))
    told = ", ".join(
        f"{plan.engine} {plan.seconds / tried[0].seconds:.2f} of the time and "
        f"{plan.memory / 1e9:.3g} GB" for plan in tried
    )  # fmt: skip
    reason = f"train.engine auto is {chosen.engine}: {told}, of {room / 1e9:.3g} GB"
    return replace(_planned(chosen.engine, work, rates), reason=reason)


def training_slots(configured: int | str, slots: int, config: AdapterConfig) -> int:
    """Return how many training jobs run at once.

    Parameters
    ----------
    configured : int or "auto"
        ``resources.jobs``; if given, it counts jobs, of however many processes.
    slots : int
        How many jobs of one process run at once.
    config : AdapterConfig
        Of the training.
    """
    return slots if configured != "auto" else max(1, slots // config.data_parallel)


def device_memory() -> float:
    """Return the memory of the first visible GPU, or of the machine (bytes)."""
    if visible_gpus() and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def training_seconds(
    base: BaseSize,
    config: AdapterConfig,
    lengths: Lengths,
    tokens: float,
    steps: Sequence[int],
    rates: Rates,
) -> float:
    """Return the seconds of a job's loop over so many tokens, by the formula of this module.

    `steps` are those of each of its adapters.
    """
    d, L = base.width, base.layers
    supervised = base.vocabulary * d * lengths.response / lengths.row
    passes = 1.5 if config.gradient_checkpointing else 1.0
    products = 4 * base.linear * passes + 6 * base.trained + 4 * supervised
    products += 14 * lengths.row * d * L
    elements = L * (41 * d + 10 * base.inner) * passes + 3 * base.trained / config.r
    return (
        tokens * products / rates.products
        + _PASSES * (tokens * elements + 25 * base.trained * sum(steps)) / rates.elements
        + _CALLS * L * max(tokens / _tokens_at_once(config), _job_steps(config, steps))
    )


def job_memory(
    base: BaseSize,
    config: AdapterConfig,
    lengths: Lengths,
    adapters: int,
    itemsize: int,
    tokens: int,
) -> float:
    """Return the bytes of a training job, beside what Python and its libraries take.

    `adapters` are those that it holds at once, `tokens` those of a forward pass.
    """
    layers = 1 if config.gradient_checkpointing else base.layers
    activations = ACTIVATION_BYTES * itemsize * tokens * base.width * layers
    if config.gradient_checkpointing:
        activations += itemsize * tokens * base.width * base.layers
    own = adapters * base.trained * (_ADAPTER_BYTES + 2 * itemsize)  # weights and gradients there
    mixed = adapters if visible_gpus() else 1  # whose A x is computed for every token
    activations += itemsize * tokens * mixed * config.r * _MODULES * layers
    supervised = min(tokens * lengths.response / lengths.row, _LOGITS)
    logits = supervised * base.vocabulary * (itemsize + 4)
    weights = float(base.parameters * itemsize)
    if config.quantisation:
        weights -= base.linear * (itemsize - NF4_BYTES)
    return weights + own + activations + logits


def _planned(engine: str, work: Workload, rates: Rates) -> TrainingPlan:
    """Plan the training by one engine."""
    base, lengths = work.base, work.lengths
    slots, team = work.slots, work.config.data_parallel
    groups = engines[engine].divide(work.sizes, slots)
    at_once = max(1, min(slots, len(groups)))
    gpus = len(visible_gpus()) // team
    part = min(at_once, gpus or 1) / at_once  # of a device, or of the cores, that a job has
    jobs = []
    beside = at_once if not gpus else -(-at_once // gpus)
    for names in groups:
        config = _fitting(work, _held_at_once(work.config, len(names)), beside)
        steps = [total_steps(max(1, work.sizes[name]), config) for name in names]
        rows = sum(steps) * config.batch_size
        tokens = int(rows * lengths.row)
        alone, loop = (
            training_seconds(base, config, lengths, tokens, steps, at) / (team if gpus else 1)
            for at in (rates, rates.part(part))
        )
        tokens_at_once = _tokens_at_once(config)
        held = _held_at_once(config, len(names))
        memory = job_memory(base, config, lengths, held, work.itemsize, tokens_at_once)
        memory *= 1 if gpus else team  # of one GPU, or of the machine
        jobs.append(JobCost(tuple(names), rows, tokens, sum(steps), START + alone, loop, memory))
    largest = sorted((job.memory for job in jobs), reverse=True)
    ends = [START + job.loop for job in jobs]
    return TrainingPlan(engine, tuple(jobs), _makespan(ends, at_once), sum(largest[:beside]))


def _held_at_once(config: AdapterConfig, adapters: int) -> int:
    """Return how many of its adapters a job holds at once."""
    return min(adapters, config.adapters_at_once or adapters)


def _job_steps(config: AdapterConfig, steps: Sequence[int]) -> float:
    """Return the steps of a job until the last of its adapters has taken all of its own."""
    return _makespan(sorted(steps, reverse=True), _held_at_once(config, len(steps)))


def _tokens_at_once(config: AdapterConfig) -> int:
    return config.tokens_at_once(gpu=bool(visible_gpus()))


def _fitting(work: Workload, adapters: int, beside: int) -> AdapterConfig:
    """Return the configuration with the tokens per forward pass that a GPU's memory leaves.

    `beside` jobs share the GPU.
    """
    tokens = _tokens_at_once(work.config)
    if visible_gpus():
        room = device_memory() / beside
        while tokens > _LEAST_TOKENS and room < job_memory(
            work.base, work.config, work.lengths, adapters, work.itemsize, tokens
        ):
            tokens //= 2
    return work.config.model_copy(update={"tokens_per_forward": tokens})


def _makespan(seconds: Sequence[float], lanes: int) -> float:
    """Return when the last job ends if each starts in its order where a lane is free."""
    ends = [0.0] * lanes
    for duration in seconds:
        first = min(range(lanes), key=lambda lane: ends[lane])
        ends[first] += duration
    return max(ends)
