"""Which weights make the best data-free merge of joint CP factors, chosen on rows of their own.

Usage: ``python benchmarks/cp_weights.py LIBRARY DATA --out FOLDER``, a library of `real_library.py`
and its data. Every merge is U diag(w) Vᵀ with weights w from the loadings C alone, at several
scales; the rivals at the same rank stand beside them. Rows are test rows of the trained tasks that
the library does not hold out, so that `merges.py` measures the choice on others.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from merge_bench import Adapters, Bench
from tables import report
from torch import Tensor

from tclora.adapter import Adapter
from tclora.adapter.union import module_factors
from tclora.evaluate.recovery import recovery
from tclora.library.names import BASE, OWN
from tclora.merge import merge
from tclora.tensor import CPFactors
from tclora.tensor.lowrank import product_energy
from tclora.tune.scale import on_line, scaled

SCALES = (0.7, 1.0, 1.4)
RIVALS = ("svd", "svc", "pico", "iso-c", "compress-then-merge")
Weigh = Callable[[CPFactors], Tensor]


def _self_weighted(cp: CPFactors, power: float) -> Tensor:
    """Weigh loadings by a power of their size: the mean of like ones, a single one as it is."""
    sizes = cp.C.abs() ** power
    return (sizes * cp.C).sum(0) / sizes.sum(0).clamp_min(1e-30)


def _largest(cp: CPFactors) -> Tensor:
    return cp.C.gather(0, cp.C.abs().argmax(0, keepdim=True))[0]


def _isotropic(weights: Tensor) -> Tensor:
    return weights.sign() * weights.abs().mean()


WEIGHTS: dict[str, Weigh] = {
    "mean of the loadings": lambda cp: cp.C.mean(0),
    "sum of the loadings": lambda cp: cp.C.sum(0),
    "loadings weighed by their size": lambda cp: _self_weighted(cp, 1),
    "largest loading": _largest,
    "isotropic, signs of the sums": lambda cp: _isotropic(cp.C.sum(0)),
    "isotropic, signs of the largest": lambda cp: _isotropic(_largest(cp)),
}  # fmt: skip


def at_mean_norm(merged: Adapter, adapters: list[Adapter]) -> Adapter:
    """Scale every module to the mean norm of the updates."""
    modules = {}
    for module, factors in merged.modules.items():
        norms = [product_energy(*f) ** 0.5 for f in module_factors(adapters, module)]
        own = product_energy(*factors) ** 0.5
        aim = sum(norms) / len(norms) / own if own else 1.0
        modules[module] = factors._replace(B=factors.B * aim)
    return Adapter(merged.name, modules, merged.base_model)


def candidates(bench: Bench) -> Iterator[tuple[str, Adapter]]:
    """Yield every merge at scale 1."""
    for rival in RIVALS:
        yield rival, merge(bench.adapters, rival, rank=bench.r).adapter
    for normalise in (False, True):
        factors = bench.factors(bench.r, normalise)
        for name, weigh in WEIGHTS.items():
            label = f"{name}{', fit of normalised adapters' if normalise else ''}"
            merged = factors.adapter({m: weigh(cp) for m, cp in factors.modules.items()})
            yield label, merged
            if name in ("mean of the loadings", "loadings weighed by their size"):
                yield f"{label}, at the updates' mean norm", at_mean_norm(merged, bench.adapters)


def other_rows(bench: Bench, data: Path, count: int) -> pd.DataFrame:
    """Draw test rows that the library does not hold out, in the cluster of most of their task's."""
    held_out = pd.read_parquet(bench.layout.held_out)
    parts = []
    for task, known in held_out[held_out["split"] == "test"].groupby("task"):
        rows = pd.read_json(data / "test" / f"{task}.jsonl", lines=True, dtype=False)
        rows = rows[~rows["prompt"].str.strip().isin(held_out["prompt"])].drop_duplicates("prompt")
        cluster = known["cluster"].mode()[0]
        parts.append(
            rows.sample(count, random_state=1).assign(task=task, split="test", cluster=cluster)
        )
    found = pd.concat(parts, ignore_index=True)
    return found.assign(id=[f"choice-{i}" for i in range(len(found))])


def main(library: Path, data: Path, out: Path, count: int) -> None:
    """Measure all candidates and report."""
    bench = Bench(library, out / library.name, 1, 1)
    bench.use(other_rows(bench, data, count))
    known: list[tuple[str, Adapters]] = [(BASE, None), (OWN, dict(enumerate(bench.adapters)))]
    references = [bench.items(adapters).assign(method=name) for name, adapters in known]
    rows: list[dict[str, object]] = []
    for name, merged in candidates(bench):
        rows.append({"weights": name, **_at_its_best(bench, references, merged)})
        note = f"{library.name}: {len(bench.rows)} rows, recovery in percent, rank {bench.r}."
        frame = pd.DataFrame(rows).sort_values("recovery", ascending=False)
        report("cp_weights", "Weights of joint CP components, data-free", frame, note)


def _at_its_best(
    bench: Bench, references: list[pd.DataFrame], merged: Adapter
) -> dict[str, object]:
    """Return recovery at scale 1 and at the best scale of a grid that goes on beyond its ends."""
    tables = {}

    def loss(scale: float) -> float:
        items = bench.items(scaled(merged, scale)).assign(method="merge")
        table = recovery(pd.concat([*references, items]), resamples=200).set_index("cluster")
        tables[scale] = 100 * table["recovery"]
        return -float(tables[scale]["mean"])

    best = on_line(loss, SCALES).scale
    return {
        "at scale 1": tables[1.0]["mean"], "worst at 1": tables[1.0]["worst"],
        "best scale": best, "recovery": tables[best]["mean"], "worst": tables[best]["worst"],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6, help="per task")
    given = parser.parse_args()
    main(given.library, given.data, given.out, given.rows)
