"""The tables of `merges.py`: recovery with paired intervals, out of domain, time and bytes."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from merge_bench import SAMPLE_ROWS
from numpy.typing import NDArray
from tables import RESULTS, markdown

from tclora.evaluate.recovery import recovery, resampled, summarise
from tclora.evaluate.statistics import Bootstrap
from tclora.library.names import BASE, OWN

_APART = 100  # clusters of the n-th library are numbered from n times this
_TITLES = {
    ("data-free", "r"): "Data-free, at rank r",
    ("calibrated", "r"): "Calibrated on sample rows, at rank r",
    ("refitted", "r"): "Component weights refitted by the loss on sample rows, at rank r",
    ("data-free", "own"): "Data-free, at the method's own rank",
    ("calibrated", "own"): "Calibrated, at the method's own rank",
    ("refitted", "own"): "Component weights refitted, at the method's own rank",
    ("library", "r"): "Libraries in the bytes of one adapter, rows by their clusters unless routed",
}  # fmt: skip


def write_tables(stores: Sequence[Path], name: str) -> None:
    """Write ``benchmarks/results/NAME.md`` from everything that has been measured.

    First of the first library alone, then, of methods that were measured on all, over all, and over
    the first ones where more methods were measured on those.
    """
    items = pd.concat([_items(store, n) for n, store in enumerate(stores)], ignore_index=True)
    parts = list(_parts(items[items["store"] == stores[0].name], stores[0]))
    shown: set[str] = set()
    for count in range(len(stores), 1, -1):
        some = items[items["store"].isin([store.name for store in stores[:count]])]
        counts = some.groupby("method")["store"].nunique()
        everywhere = some[some["method"].map(counts) == count]
        parts += _parts(everywhere, stores[0], f", {count} training seeds", shown)
        shown |= set(everywhere["method"])
    text = "\n\n".join([_head(items, stores), *parts]) + "\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _parts(
    items: pd.DataFrame, store: Path, of: str = "", shown: Collection[str] = ()
) -> Iterator[str]:
    """Yield a table for every kind of merge, unless all of its methods have been shown."""
    figures = _figures(items)
    for (variant, rank), title in _TITLES.items():
        keys = [k for k in figures.index if k.startswith((f"{variant}@{rank}@", "reference@"))]
        if len(keys) > len(_references(keys)) and not set(keys) <= set(shown):
            yield f"## {title}{of}\n\n{_table(items, figures, keys, store)}"


def _items(store: Path, number: int) -> pd.DataFrame:
    tables = [pd.read_parquet(file) for file in sorted((store / "cells").glob("*.parquet"))]
    items = pd.concat(tables, ignore_index=True)
    return items.assign(
        store=store.name,
        id=f"{number}/" + items["id"],
        cluster=items["cluster"].astype(int) + _APART * number,
        method=items["method"].replace({f"reference@-@{n}": n for n in (BASE, OWN)}),
    )


def _figures(items: pd.DataFrame) -> pd.DataFrame:
    """Return recovery, NLL and accuracy per method, over the libraries that it was measured on."""
    rows: dict[str, dict[str, Any]] = {}
    for method in items["method"].unique():
        chosen = _with_references(items, [method])
        rows[method] = _recovered(chosen, method) if method not in {BASE, OWN} else {}
        figures = summarise(chosen[chosen["method"] == method], resamples=200)
        whole = figures[figures["group_kind"] == "all"].set_index("split")
        for split in ("test", "ood"):
            there = split in whole.index  # not every library has rows of other tasks
            rows[method][f"{split} nll"] = whole.loc[split, "nll"] if there else np.nan
            rows[method][f"{split} accuracy"] = whole.loc[split, "accuracy"] if there else np.nan
    return pd.DataFrame.from_dict(rows, orient="index")


def _with_references(items: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return the items of methods, and of base and own, on the rows that all were measured on."""
    chosen = items[items["method"].isin([BASE, OWN, *methods])]
    counts = chosen.groupby("id")["method"].nunique()
    return chosen[chosen["id"].map(counts) == chosen["method"].nunique()]


def _recovered(items: pd.DataFrame, method: str, against: str | None = None) -> dict[str, Any]:
    table = recovery(items, against=against).set_index(["method", "cluster"])
    mean, worst = table.loc[(method, "mean")], table.loc[(method, "worst")]
    return {
        "mean": mean["recovery"], "low": mean["low"], "high": mean["high"],
        "worst": worst["recovery"], "n": worst["n"],
    }  # fmt: skip


def _references(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key.startswith("reference@")]


def _table(items: pd.DataFrame, figures: pd.DataFrame, keys: Sequence[str], store: Path) -> str:
    keys = [*keys, BASE, OWN]
    merges = [k for k in keys if "@" in k and not k.startswith("reference@")]
    rivals = [k for k in merges if not any(own in k for own in ("tc-lora", "(ours)", "few-step"))]
    best = figures.loc[rivals, "mean"].idxmax() if rivals else None
    alike = _tasks_alike(items, keys)
    least = min((k for k in merges if k in alike), key=lambda k: alike[k][0], default=None)
    order = figures.loc[keys, "mean"].fillna(np.inf).sort_values(ascending=False).index
    rows = []
    for key in order:
        f = figures.loc[key]
        kept = store / "merges" / (key if "few-step" not in key else "few-step")
        record = _record(kept)
        rows.append({
            "method": key.rpartition("@")[2].replace("_", " ") + _fewer(items, key),
            "setting": record.get("setting", ""),
            "recovery": _interval(f["mean"], f["low"], f["high"]),
            "minus best rival": "best rival" if key == best else _minus(items, key, best),
            "worst (rows)": "" if np.isnan(f["mean"]) else f"{100 * f['worst']:.0f} ({f['n']:.0f})",
            "NLL": _number(f["test nll"]),
            "exact match": _number(f["test accuracy"], 2),
            "other tasks: NLL": _number(f["ood nll"]),
            "tasks alike": _number(alike[key][0]) if key in alike else "",
            "minus least": "least" if key == least else _beyond(alike, key, least),
            "accuracy": _number(f["ood accuracy"]),
            "merge (CPU s)": f"{record['seconds']:.0f}" if "seconds" in record else "",
            "MB": f"{_bytes(kept) / 1e6:.1f}" if any(kept.glob("*.safetensors")) else "",
        })  # fmt: skip
    return markdown(pd.DataFrame(rows))


def _tasks_alike(
    items: pd.DataFrame, methods: Collection[str]
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """Return the NLL on other tasks, the mean over them, and its resamples, paired."""
    others = items[(items["split"] == "ood") & items["method"].isin(methods)]
    found = [
        resampled(part, "nll", Bootstrap(seed=number))
        for number, (_, part) in enumerate(others.groupby("task", sort=True))
    ]
    return {
        method: (
            float(np.mean([part[method].point for part in found])),
            np.mean([part[method].draws for part in found], axis=0),
        )
        for method in (found[0] if found else ())
    }


def _fewer(items: pd.DataFrame, key: str) -> str:
    """Return on how many rows a method was measured where they are not those of the base."""
    counts = items.groupby(["method", "split"]).size().unstack(fill_value=0)
    if counts.loc[key].equals(counts.loc[BASE]):
        return ""
    return f" (on {', '.join(f'{n} {split}' for split, n in counts.loc[key].items())})"


def _beyond(
    alike: dict[str, tuple[float, NDArray[np.float64]]], key: str, least: str | None
) -> str:
    if least is None or key not in alike:
        return ""
    point, draws = (one - other for one, other in zip(alike[key], alike[least], strict=True))
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{point:.3f} [{low:.3f}, {high:.3f}]"


def _minus(items: pd.DataFrame, key: str, best: str | None) -> str:
    if best is None or key in {BASE, OWN}:
        return ""
    found = _recovered(_with_references(items, [key, best]), key, against=best)
    return f"{_interval(found['mean'], found['low'], found['high'])}"


def _number(value: float, digits: int = 3) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def _interval(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _record(folder: Path) -> dict[str, Any]:
    file = folder.with_name(f"{folder.name}.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _head(items: pd.DataFrame, stores: Sequence[Path]) -> str:
    base = items[items["method"] == BASE]
    counts = base.groupby(["store", "split"]).size().unstack().iloc[0]
    tasks = base.groupby("split")["task"].unique()
    library = json.loads((stores[0] / "about.json").read_text(encoding="utf-8"))
    others = ""
    if "ood" in counts:
        others = f" and {counts['ood']} rows of others ({', '.join(sorted(tasks['ood']))})"
    clusters = base.loc[base["store"] == stores[0].name, "cluster"].nunique()
    seeds = "one training seed"
    if len(stores) > 1:
        seeds += f" unless a title says otherwise ({len(stores)}, each with rows and clusters)"
    return (
        f"# Merge methods on the adapters of {len(tasks['test'])} tasks\n\n"
        f"{library['base']}, {seeds}: tasks {', '.join(sorted(tasks['test']))} "
        f"in {clusters} text clusters, "
        f"rank r = {library['rank']}. Measured on {counts['test']} held-out rows of these tasks"
        f"{others} per seed by `benchmarks/merges.py`.\n\n"
        "Recovery is (base - merged) / (base - own adapter) in response NLL per token, in percent, "
        "the mean over clusters; intervals are 95 % bootstraps "
        "over rows, paired between methods, seeds fixed. Exact match: the greedy answer is the "
        "reference. Rivals are methods of others. NLL on other tasks is per token of all of them, "
        "so that those of long responses count most, and, tasks alike, the mean over them; beside "
        "it, that minus the least of the table's merges. "
        "Accuracy on other tasks: the likeliest choice "
        "where there are choices, else exact match. Time is of one merge from the adapters on, "
        "factorisation included, without tuning and statistics (those of a merge layer by layer "
        "are part of it); of refits and libraries it is that of what is added, of the few-step "
        "LoRA that of the chosen rate, all on the first library. "
        "Sample rows per cluster: "
        f"{', '.join(f'{n} for {use}' for use, n in SAMPLE_ROWS.items())}. "
        "Scales are the defaults, or tuned on the sample rows with every cluster "
        "counting the same, the grid going on where its end is best, densities of "
        "0.1, 0.3, 0.5, 0.9 and the method's default tried too where it has one."
    )
