"""Every merge method at its best on adapters of real tasks, in domain and out of it.

Usage: ``python benchmarks/merges.py LIBRARY... --out FOLDER``, libraries of `real_library.py`, one
per training seed, or that of a run, such as the demo's. Each method runs data-free at the authors'
scale where they name one, else at its default; *calibrated* with its scale and density tuned on
sample rows, or with activation statistics; and *refitted*, its component weights fitted by the base
model's loss; at the LoRA rank r and at its own rank, if it has one. Sample rows are training rows,
8 per cluster for statistics, 4 others for tuning and 4 others for the refit. The control of the
refit is a fresh LoRA trained on the same rows in as many steps, its learning rate the best of four.
What has been measured is kept in FOLDER: a command that was stopped (or that ran out of
``--seconds``) goes on where it was, and several at once share the work; ``--only`` takes a regular
expression of cells. ``--report`` writes the tables of all libraries. One library takes some two
hours on two cores.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise import merge_by_layers
from merge_bench import Adapters, Bench
from merge_libraries import libraries
from merge_tables import write_tables

from tclora.adapter import Adapter
from tclora.adapter.union import module_names
from tclora.config import AdapterConfig
from tclora.merge import merge
from tclora.model.cluster_loss import ClusterLoss
from tclora.train.loop import train_adapter
from tclora.tune.components import fit_components
from tclora.tune.scale import is_scaled, tune_scale

DENSE = 1 << 20  # a rank that nothing reaches: the dense update as it is
STEPS = 10  # of a refit and of its control
REFIT_RATE = 0.05  # half of a run's, which takes half as many steps
DENSITIES = (0.1, 0.3, 0.5, 0.9)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TRAINED = AdapterConfig(batch_size=1 << 10, epochs=1 << 10, max_steps=STEPS)


@dataclass(frozen=True)
class Method:
    """A registered merge with options of its own.

    Attributes
    ----------
    label : str
        What tables call it.
    name : str
        Registered name.
    options : Mapping
        Its options, the authors' numbers among them.
    statistics : {"", "base", "own", "layers"}
        Whose activations it is given: none, the base model's, those with each own adapter, or layer
        by layer those of what has been merged.
    own : {"", "rank", "dense"}
        Whether it has a rank of its own that is not r, or none at all.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: str = ""
    own: str = "rank"


METHODS = (
    Method("uniform", "uniform"),
    Method("task arithmetic", "task-arithmetic"),
    Method("TIES", "ties", own="dense"),
    Method("DARE", "dare", own="dense"),
    Method("DARE-TIES", "dare-ties", own="dense"),
    Method("KnOTS-TIES", "knots-ties"),
    Method("TSV-M (Core Space: the same)", "tsv-m"),
    Method("ISO-C (Core Space: the same)", "iso-c"),
    Method("ISO-CTS", "iso-cts"),
    Method("Core Space, TIES, published gauge", "core-space", {"gauge": "published"}),
    Method("Core Space, TIES, balanced gauge", "core-space"),
    Method("WUDI", "wudi"),
    Method("SVC", "svc"),
    Method("Pico", "pico"),
    Method("Pico, TSV-M", "pico", {"rule": "tsv-m"}),
    Method("Compress-then-Merge", "compress-then-merge", own=""),
    Method("RegMean, base model's activations", "regmean", statistics="base"),
    Method("RegMean, own adapters' activations (published)", "regmean", statistics="own"),
    Method("RegMean++", "regmean", statistics="layers"),
    Method("RegMean, the drift's metric (ours)", "regmean-drift"),
    Method("RegMean, the drift's metric, not damped (ours)", "regmean-drift", {"damping": 0}),
    Method("tc-lora-drift", "tc-lora-drift", own=""),
    Method("tc-lora-drift, not damped", "tc-lora-drift", {"damping": 0}, own=""),
    Method("tc-lora-mean", "tc-lora-mean", own=""),
    Method("tc-lora-sum", "tc-lora-sum", own=""),
    Method("tc-lora, base model's activations", "tc-lora-activation", statistics="base", own=""),
    Method("tc-lora, own adapters' activations", "tc-lora-activation", statistics="own", own=""),
    Method("tc-lora, clusters' own metrics", "tc-lora-metric", statistics="base", own=""),
    Method("tc-lora, layer by layer", "tc-lora-activation", statistics="layers", own=""),
)  # fmt: skip


def key_of(method: Method, variant: str, rank: str) -> str:
    """Return the name of a cell, which is a file name as well."""
    return f"{variant}@{rank}@{method.label}".replace(" ", "_").replace(":", "")


def cells(bench: Bench) -> Iterator[tuple[str, Callable[[], Adapters]]]:
    """Yield the name of every cell and what makes it, in the order of their worth."""
    for name, adapters in bench.references.items():
        yield f"reference@-@{name}", lambda found=adapters: found
    yield "refitted@r@few-step_LoRA", lambda: bench.keep("few-step", lambda: few_steps(bench))
    for method in METHODS:
        yield from _plain(bench, method, "r")
    yield from libraries(bench, lambda key: merged(bench, key))
    for method in METHODS:
        key = key_of(method, "refitted", "r")
        yield key, lambda key=key: merged(bench, key)
    for method in METHODS:
        if method.own:
            yield from _plain(bench, method, "own")
        if method.own == "rank":
            key = key_of(method, "refitted", "own")
            yield key, lambda key=key: merged(bench, key)


def _plain(bench: Bench, method: Method, rank: str) -> Iterator[tuple[str, Callable[[], Adapters]]]:
    variants = ["calibrated"] if method.statistics else ["data-free"]
    variants += ["calibrated"] if is_scaled(method.name) else []
    for variant in variants:
        key = key_of(method, variant, rank)
        yield key, lambda key=key: merged(bench, key)


def merged(bench: Bench, key: str) -> Adapter:
    """Return the merge of a cell, made unless it is there."""
    variant, rank, _ = key.split("@")
    method = next(m for m in METHODS if key_of(m, variant, rank) == key)
    if variant == "refitted":
        return bench.keep(key, lambda: _refitted(bench, method, rank))
    asked = bench.r if rank == "r" else DENSE if method.own == "dense" else None
    return bench.keep(key, lambda: _merged(bench, method, variant, asked))


def _merged(
    bench: Bench, method: Method, variant: str, rank: int | None
) -> tuple[Adapter, dict[str, Any]]:
    settings: dict[str, Any] = {"rank": rank, **method.options}
    seconds = 0.0
    if method.statistics == "layers":
        rows = bench.sample("statistics")
        adapter = merge_by_layers(
            bench.model, bench.adapters, rows, method.name, pad_id=bench.loaded.pad_id, **settings
        )
        return adapter, {"setting": ""}
    if method.statistics:
        settings["statistics"] = bench.statistics(method.statistics)
    elif method.name.startswith("tc-lora"):
        settings["factors"] = bench.factors(bench.r)
        seconds = bench.factor_seconds(bench.r)  # of others too, their SVDs count
    if variant == "calibrated" and is_scaled(method.name):
        found = tune_scale(
            bench.model,
            bench.adapters,
            method.name,
            bench.sample("scale"),
            densities=DENSITIES,
            **settings,
        )
        settings |= found.options
    begin = time.process_time()
    result = merge(bench.adapters, method.name, **settings)
    seconds += time.process_time() - begin
    chosen = {k: settings[k] for k in ("scale", "density") if k in settings}
    setting = ", ".join(f"{k} {v:.3g}" for k, v in chosen.items()) or "; ".join(result.notes[:1])
    return result.adapter, {"setting": setting, "seconds": seconds}


def _refitted(bench: Bench, method: Method, rank: str) -> tuple[Adapter, dict[str, Any]]:
    calibrated = method.statistics or is_scaled(method.name)
    start = merged(bench, key_of(method, "calibrated" if calibrated else "data-free", rank))
    rows = [row for part in bench.sample("refit").values() for row in part]
    begin = time.process_time()  # the merge before it may have been made just now
    found = fit_components(
        bench.model, start, rows, token_budget=bench.budget // 4, n_steps=STEPS,
        learning_rate=REFIT_RATE,
    )  # fmt: skip
    seconds = time.process_time() - begin
    setting = f"loss {found.losses[0]:.3f} to {min(found.losses):.3f}"
    return found.adapter, {"setting": setting, "seconds": seconds}


def few_steps(bench: Bench) -> tuple[Adapter, dict[str, Any]]:
    """Train a fresh LoRA on the rows of the refit, in as many steps, at the best learning rate.

    That is chosen where scales are: on the rows of their tuning, every cluster counting the same.
    As of them, the time is that of what was chosen.
    """
    rows = [row for part in bench.sample("refit").values() for row in part]
    tuned = ClusterLoss(bench.model, bench.sample("scale"), module_names(bench.adapters))
    tried: dict[float, tuple[float, Adapter, float]] = {}
    for rate in RATES:
        loaded, folder = bench.loaded.base.load(), bench.store / f"few-step-{rate:g}"
        config = TRAINED.model_copy(update={"lr": rate})
        begin = time.process_time()
        train_adapter(
            loaded.model, rows, config, folder, base_model=loaded.base.location, seed=bench.seed
        )
        seconds = time.process_time() - begin
        adapter = bench.read(folder, "few-step")
        tried[rate] = tuned.mean(adapter), adapter, seconds
    best = min(tried, key=lambda rate: tried[rate][0])
    _, adapter, seconds = tried[best]
    setting = f"{STEPS} steps on {len(rows)} rows, lr {best:g}"
    return adapter, {"setting": setting, "seconds": seconds}


def main(chosen: Sequence[Path], out: Path, arguments: argparse.Namespace) -> None:
    """Measure what has not been measured."""
    end = time.process_time() + arguments.seconds
    for library in chosen:
        bench = Bench(
            library, out / library.name, arguments.rows, arguments.other_rows, arguments.choices
        )
        for key, make in cells(bench):
            if time.process_time() > end:
                return
            if re.search(arguments.only, key):
                bench.measure(key, make)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=60, help="held-out rows per trained task")
    parser.add_argument("--other-rows", type=int, default=20, help="rows per other task")
    parser.add_argument("--no-choices", dest="choices", action="store_false")
    parser.add_argument("--only", default="", help="regular expression of cells")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the processor")
    parser.add_argument("--report", action="store_true", help="write the tables and stop")
    parser.add_argument("--name", default="merges", help="of the tables' file")
    given = parser.parse_args()
    if given.report:
        write_tables([given.out / library.name for library in given.libraries], given.name)
    else:
        main(given.libraries, given.out, given)
