"""How adapters would be trained: the jobs of every engine, and which engine `auto` stands for.

What a job costs is `tclora.preflight.training_cost`'s to say.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tclora.config import AdapterConfig
from tclora.jobs.devices import visible_gpus
from tclora.preflight.rates import Rates
from tclora.preflight.sizes import BaseSize
from tclora.preflight.training_cost import (
    Lengths,
    forward_tokens,
    job_memory,
    shares_of_loop,
    spans,
    training_seconds,
)
from tclora.train.course import total_steps
from tclora.train.engines import engines

START = 6.0  # of a job: imports and loading a small model (s)
AUTO = ("separate", "together")  # what the engine `auto` chooses from
_LEAST_TOKENS = 1024  # per forward pass, that a GPU of little memory is planned with
NOMINAL = Rates.given(1e11)  # a choice must not follow what else the machine does


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
    shares : tuple of float
        Part of the loop in which each adapter is held (0 to 1).
    """

    names: tuple[str, ...]
    rows: int
    tokens: int
    steps: int
    seconds: float
    loop: float
    memory: float
    shares: tuple[float, ...]


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
        """Adapter → seconds of its part in the loop of its job, beside other jobs."""
        return {
            name: share * job.loop
            for job in self.jobs
            for name, share in zip(job.names, job.shares, strict=True)
        }


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
        held = work.config.held_at_once(len(names))
        config = _fitting(work, held, beside)
        steps = [total_steps(max(1, work.sizes[name]), config) for name in names]
        rows = sum(steps) * config.batch_size
        tokens = int(rows * lengths.row)
        alone, loop = (
            training_seconds(base, config, lengths, tokens, steps, at) / (team if gpus else 1)
            for at in (rates, rates.part(part))
        )
        tokens_at_once = forward_tokens(config)
        memory = job_memory(base, config, lengths, held, work.itemsize, tokens_at_once)
        memory *= 1 if gpus else team  # of one GPU, or of the machine
        counts = rows, tokens, sum(steps)
        shares = tuple(shares_of_loop(config, steps))
        jobs.append(JobCost(tuple(names), *counts, START + alone, loop, memory, shares))
    largest = sorted((job.memory for job in jobs), reverse=True)
    ends = [START + job.loop for job in jobs]
    last = max(end for _, end in spans(ends, at_once))
    return TrainingPlan(engine, tuple(jobs), last, sum(largest[:beside]))


def _fitting(work: Workload, adapters: int, beside: int) -> AdapterConfig:
    """Return the configuration with the tokens per forward pass that a GPU's memory leaves.

    `beside` jobs share the GPU.
    """
    tokens = forward_tokens(work.config)
    if visible_gpus():
        room = device_memory() / beside
        while tokens > _LEAST_TOKENS and room < job_memory(
            work.base, work.config, work.lengths, adapters, work.itemsize, tokens
        ):
            tokens //= 2
    return work.config.model_copy(update={"tokens_per_forward": tokens})
