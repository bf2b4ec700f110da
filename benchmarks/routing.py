"""How a library routes: in domain, reworded, out of domain and composed, beside other ways.

Usage: ``python benchmarks/routing.py LIBRARY WORK [ROWS]``, a finished run with held-out rows and a
folder that keeps what was measured, so that a stopped measurement goes on. A library of the demo's
families gets `ROWS` (20) new rows of each and ``rewordings.jsonl``; any other its own held-out
rows. Fallback and abstention are calibrated on training rows of the run alone.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import ArrowConfig, create_arrow_model
from routed_rivals import lorauter, spectr, stacked
from routing_bench import NEVER, OURS, Bench
from tables import report

from tclora.library.names import BASE, JOINT, OWN
from tclora.route import Abstention, Routing

ROWS = 20


def measure_all(bench: Bench) -> tuple[dict[str, pd.DataFrame], dict[str, Routing]]:
    """Measure every way to answer; return the items and the routings of those that route."""
    fallback, abstention = bench.rules()
    ours = bench.gate_fit.gated(fallback)
    before = bench.gate_fit.gated()  # falls back to the static merge
    nearest = bench.router(NEVER).route(bench.vectors)
    items = {
        BASE: bench.measured(BASE),
        "static": bench.with_adapter("static", bench.primary),
        JOINT: bench.with_adapter(JOINT, bench.read(bench.layout.adapter(JOINT))),
        "fallback alone": bench.with_adapter("fallback alone", ours.blended(1.0).adapter),
        "static, half fallback": bench.with_adapter(
            "static, half fallback", ours.blended(0.5).adapter
        ),
        "average of the adapters": bench.with_adapter(
            "average of the adapters", stacked(bench.adapters).mixed(_even(bench))
        ),
    }
    routings = {
        "never abstaining": nearest,
        "softmax, never abstaining": bench.router(NEVER, "softmax").route(bench.vectors),
        "membership, never abstaining": bench.router(NEVER, "membership").route(bench.vectors),
        OURS: bench.router(abstention).route(bench.vectors),
        "step": bench.router(replace(abstention, width=0.0)).route(bench.vectors),
        "default rules": bench.router(Abstention()).route(bench.vectors),
    }
    items |= bench.routed(ours, routings)
    earlier = {
        "before (static beyond a threshold)": bench.former(),
        "smooth, towards static": routings[OURS],
    }
    items |= bench.routed(before, earlier)
    centroids = bench.router(NEVER).clusters.centroids
    separate = {
        "LORAUTER, separate adapters": lorauter(bench.vectors, centroids),
        "nearest, separate adapters": nearest,
    }
    items |= bench.routed(stacked(bench.adapters), separate)
    for top_k in (1, None):
        name = f"SpectR, {'all' if top_k is None else f'top {top_k}'}"
        items[name] = bench.measured(
            name, lambda _, k=top_k: spectr(bench.model, bench.adapters, k)
        )
        name = f"PEFT Arrow, top {top_k or 3}"
        items[name] = bench.measured(name, model=_arrow(bench, name, top_k or 3))
    return items, routings | earlier | separate


def _even(bench: Bench) -> list[float]:
    return [1 / len(bench.adapters)] * len(bench.adapters)


def _arrow(bench: Bench, name: str, top_k: int) -> Any:  # noqa: ANN401
    if (bench.work / f"{name}.parquet").exists():
        return None
    paths = [str(bench.layout.adapter(adapter.name)) for adapter in bench.adapters]
    config = ArrowConfig(top_k=min(top_k, len(paths)), router_temperature=1.0)
    return create_arrow_model(
        base_model=bench.base(), task_specific_adapter_paths=paths, arrow_config=config
    ).eval()


def own_items(bench: Bench) -> pd.DataFrame:
    """Measure rows of trained tasks under their cluster's own adapter."""
    known = bench.rows["cluster"].notna() & bench.rows["split"].isin(["test", "reworded"])
    weights = np.full((len(bench.rows), len(bench.adapters)), 1 / len(bench.adapters), "float32")
    labels = bench.rows["cluster"].fillna(0).astype(int)
    weights[known] = np.eye(len(bench.adapters), dtype="float32")[labels[known]]
    everyone = np.ones(len(weights), dtype=bool)
    routing = {OWN: Routing(weights, everyone, weights.max(axis=1))}
    items = bench.routed(stacked(bench.adapters), routing)[OWN]
    return items[items["id"].isin(bench.rows.loc[known, "id"])]


def table(
    bench: Bench, items: dict[str, pd.DataFrame], routings: dict[str, Routing]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield every split and a table of the methods on it."""
    for split, group in bench.rows.groupby("split", sort=False):
        ids = group["id"].tolist()
        parts = {m: i.set_index("id").reindex(ids).dropna(subset="nll") for m, i in items.items()}
        base, routed, static = (parts[name]["nll"] for name in (BASE, "never abstaining", "static"))
        better = np.minimum(routed, static)  # row by row
        tokens = parts[BASE]["tokens"].sum()
        rows = []
        for method, part in parts.items():
            if len(part) < len(group):  # the own adapters, where rows belong to none
                continue
            gain = base.sum() - better.sum()
            split_gain = base.sum() - min(routed.sum(), static.sum())
            row: dict[str, Any] = {
                "method": method,
                "NLL": part["nll"].sum() / tokens,
                "accuracy": part["correct"].astype(float).mean(),
                "regret, row by row (%)": 100 * (part["nll"].sum() - better.sum()) / gain,
                "regret, whole (%)": 100
                * (part["nll"].sum() - min(routed.sum(), static.sum()))
                / split_gain,
            }
            if method in routings:
                row |= _routing_figures(group, routings[method])
            rows.append(row)
        yield str(split), pd.DataFrame(rows).fillna("-")


def _routing_figures(group: pd.DataFrame, routing: Routing) -> dict[str, object]:
    """Return coverage, share routed rightly, and share wrongly abstained from."""
    known = routing.known[group.index]
    figures: dict[str, object] = {
        "coverage (%)": 100 * known.mean(), "belonging": routing.shares[group.index].mean(),
    }  # fmt: skip
    if group["cluster"].notna().all() and set(group["split"]) <= {"test", "reworded"}:
        right = routing.weights[group.index].argmax(axis=1) == group["cluster"].to_numpy()
        figures["nearest right (%)"] = 100 * right.mean()
        figures["wrongly abstained (%)"] = 100 * (right & ~known).mean()
    return figures


_TITLES = {
    "test": "In domain", "reworded": "Reworded", "ood": "Out of domain",
    "composition": "Composition",
}  # fmt: skip


def main(library: Path, work: Path, rows: int) -> None:
    """Measure everything and report."""
    bench = Bench(library, work, rows)
    items, routings = measure_all(bench)
    items[OWN] = own_items(bench)
    fallback, abstention = bench.rules()
    print(fallback, abstention)
    for split, frame in table(bench, items, routings):
        count = int((bench.rows["split"] == split).sum())
        title = _TITLES.get(split, split)
        report(
            f"routing_{library.name}_{split}",
            f"{title}: ways to answer {count} rows",
            frame,
            f"{library.name}: fallback {fallback}, abstention {abstention}, calibrated on 8 "
            "training rows per cluster. Regret against the better of routed and static, of the "
            "gain in NLL over the base.",
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else ROWS)
