"""Which weights make the best data-free merge of joint CP factors, chosen on rows of their own.

Usage: ``python benchmarks/cp_weights.py LIBRARY DATA --out FOLDER``, a library of `real_library.py`
and its data. Every merge is U diag(w) Vᵀ with weights w from the loadings C alone, at several
scales; the rivals at the same rank stand beside them. Rows are test rows of the trained tasks that
the library does not hold out, so that `merges.py` measures the choice on others.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from tclora.tune.scale import scaled

SCALES = (0.7, 1.0, 1.4, 2.0)
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


def candidates(bench: Bench) -> Iterator[tuple[str, Callable[[], Adapter]]]:
    """Yield the name of every candidate and what merges by it, at scale 1."""
    for rival in RIVALS:
        yield rival, partial(bench.keep, f"data-free@r@{rival}", partial(_rival, bench, rival))
    for normalise in (False, True):
        for name in WEIGHTS:
            label = f"{name}{', fit of normalised adapters' if normalise else ''}"
            yield label, partial(_weighted, bench, name, normalise)
            yield f"{label}, mean norm", partial(_at_mean_norm, bench, name, normalise)


def _weighted(bench: Bench, name: str, normalise: bool) -> Adapter:
    factors = bench.factors(bench.r, normalise)
    return factors.adapter({m: WEIGHTS[name](cp) for m, cp in factors.modules.items()})


def _at_mean_norm(bench: Bench, name: str, normalise: bool) -> Adapter:
    """Scale every module of a merge to the mean norm of the updates."""
    merged, modules = _weighted(bench, name, normalise), {}
    for module, factors in merged.modules.items():
        norms = [product_energy(*f) ** 0.5 for f in module_factors(bench.adapters, module)]
        own = product_energy(*factors) ** 0.5
        modules[module] = factors._replace(B=factors.B * (sum(norms) / len(norms) / own))
    return Adapter(merged.name, modules, merged.base_model)


def _rival(bench: Bench, name: str) -> tuple[Adapter, dict[str, Any]]:
    return merge(bench.adapters, name, rank=bench.r).adapter, {}


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


def main(library: Path, data: Path, options: argparse.Namespace) -> None:
    """Measure the candidates and report."""
    bench = Bench(library, options.out / library.name, 1, 1)
    bench.use(other_rows(bench, data, options.rows))
    scales: Sequence[float] = options.scales
    known: list[tuple[str, Adapters]] = [(BASE, None), (OWN, dict(enumerate(bench.adapters)))]
    references = [bench.items(adapters).assign(method=name) for name, adapters in known]
    rows: list[dict[str, object]] = []
    for name, make in candidates(bench):
        if not re.search(options.only, name):
            continue
        merged = make()
        rows.append({"weights": name, **_measured(bench, references, merged, scales)})
        note = f"{library.name}: {len(bench.rows)} rows, recovery in percent, rank {bench.r}."
        frame = pd.DataFrame(rows).sort_values(f"at scale {scales[0]:g}", ascending=False)
        report("cp_weights", "Weights of joint CP components, data-free", frame, note)


def _measured(
    bench: Bench, references: list[pd.DataFrame], merged: Adapter, scales: Sequence[float]
) -> dict[str, object]:
    """Return mean and worst recovery at every scale."""
    found: dict[str, object] = {}
    for scale in scales:
        items = bench.items(scaled(merged, scale)).assign(method="merge")
        table = recovery(pd.concat([*references, items]), resamples=200).set_index("cluster")
        found[f"at scale {scale:g}"] = 100 * table.loc["mean", "recovery"]
        found[f"worst at {scale:g}"] = 100 * table.loc["worst", "recovery"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--only", default="", help="regular expression of candidates")
    parser.add_argument("--rows", type=int, default=6, help="per task")
    given = parser.parse_args()
    main(given.library, given.data, given)
