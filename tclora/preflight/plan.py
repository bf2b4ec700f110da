"""What a run would cost, before it starts: what is fetched, rows, tokens, steps, time and memory.

Training is planned by `tclora.preflight.training`, the other stages by
`tclora.preflight.stage_costs`. Further training seeds repeat all that follows the clusters.

Not covered: downloads' time, generated tokens beyond their operations (a GPU spends more on reading
weights), merging and factorising (minutes at most, see ``benchmarks/results/large_library.md``),
and the stages that `uncovered` names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tclora.config import Config, GateConfig
from tclora.data.demo import DEMO
from tclora.jobs.devices import visible_gpus
from tclora.model.locate import BUILTIN_BASE, BUILTIN_EMBEDDER, choose_dtype, default_device
from tclora.preflight.models import Models
from tclora.preflight.rates import Rates, measured_rates
from tclora.preflight.sizes import base_size, count_rows
from tclora.preflight.stage_costs import UTILISATION, BaseCosts, StageCost, embed_cost, lanes
from tclora.preflight.steps import LAST, STEPS
from tclora.preflight.training import START, JobCost

_STEP_OF = {
    "embed": "prepare", "features": "prepare", "train": "train", "statistics": "merge",
    "refit": "merge", "evaluate": "evaluate",
}  # fmt: skip


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
    cost = BaseCosts(config, rows, base_size(models.base, config.train), dtype.itemsize, rates)
    stages = [embed_cost(config, models, rows, measured), *cost.features()]
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
        f"{lanes(config, 1000)} at once that do not slow each other, {START:g} s to start each",
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


def _device(processes: int) -> str:
    if not visible_gpus():
        return "CPU"
    return "one GPU" if processes == 1 else f"{processes} GPUs"
