"""Studies of what is learned: held-out NLL of every method in every cell, against a control.

A seed is one run of a setting: of a cell, and of each of its further training seeds (`seeds`).

Symbols: S seeds, n held-out rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tclora.config import IntervalConfig
from tclora.evaluate.statistics import Bootstrap
from tclora.library.names import OWN, ROUTED
from tclora.report.notation import MISSING
from tclora.study.cells import Cell
from tclora.study.plot import draw_estimates
from tclora.study.registry import Outcome, Study, studies

SEED = "seed"
EMBEDDERS = ("all-minilm-l6-v2", "smollm2-135m-instruct")
_Key = tuple[tuple[str, Any], ...]


def compare_methods(
    cells: Sequence[Cell], control: Mapping[str, Any], config: IntervalConfig
) -> Outcome:
    """Summarise the held-out rows of every setting, and how far it is from the control's.

    Returns
    -------
    Outcome
        Table with a column per axis, and clusters (K that was found, mean over seeds), method, n
        (rows), seeds, nll (nats per response token) with low and high, difference (to the same
        method in the control, seed by seed and row by row where both have them; negative is
        better) with its ends. Seeds of a setting count as one.
    """
    settings = _by_setting(cells)
    items = {key: _items(group) for key, group in settings.items()}
    rows = []
    for key, group in settings.items():
        against = _control_of(key, control, settings)
        for method in items[key]["method"].unique():
            own = _measured(items[key], method)
            other = _measured(items[against], method) if against and against != key else None
            rows.append(
                {
                    **dict(key),
                    "clusters": np.mean([_clusters(cell) for cell in group]),
                    "method": method,
                    "n": own.nll.shape[1],
                    "seeds": len(own.nll),
                    **_estimate("nll", own.nll, own.tokens, config),
                    **_difference(own, other, config),
                }
            )
    table = pd.DataFrame(rows)
    return Outcome(table, _draw(table, list(dict(next(iter(settings))))), _notes(control, config))


def _by_setting(cells: Sequence[Cell]) -> dict[_Key, list[Cell]]:
    """Group cells that differ in their seed alone."""
    groups: dict[_Key, list[Cell]] = {}
    for cell in cells:
        key = tuple((name, value) for name, value in cell.values.items() if name != SEED)
        groups.setdefault(key, []).append(cell)
    return groups


def _control_of(
    key: _Key, control: Mapping[str, Any], settings: Mapping[_Key, list[Cell]]
) -> _Key | None:
    """Return the control of a setting: the same but for the control's own values.

    Where a value of the setting does not count (None), the control's first will do.
    """
    if not control:
        return None
    wanted = {**dict(key), **control}
    for other in settings:
        values = dict(other)
        if all(value is None or values.get(name) == value for name, value in wanted.items()):
            return other
    return None


def _items(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the measured in-domain rows of a setting, with the seeds of cell and training."""
    parts = []
    for cell in cells:
        items = pd.read_parquet(cell.layout.evaluation.items).assign(cell=cell.config.seed)
        if "seed" not in items:  # a single training seed
            items["seed"] = cell.config.of_training
        parts.append(items)
    items = pd.concat(parts, ignore_index=True)
    primary = cells[0].config.merge.primary
    kept = items["method"].isin([OWN, primary, ROUTED]) & (items["split"] == "test")
    return items[kept]


@dataclass(frozen=True)
class _Measured:
    """A method's NLL (S, n), an index of (cell, seed) and columns of ids; tokens of the rows."""

    nll: pd.DataFrame
    tokens: "pd.Series[float]"


def _measured(items: pd.DataFrame, method: str) -> _Measured:
    """Return what a method has on the rows that all of its seeds have."""
    rows = items[items["method"] == method]
    nll = rows.pivot(index=["cell", "seed"], columns="id", values="nll").dropna(axis="columns")
    return _Measured(nll, rows.groupby("id")["tokens"].first()[nll.columns])


def _clusters(cell: Cell) -> int:
    table = pd.read_parquet(cell.layout.clusters, columns=["cluster", "split"])
    return int(table.loc[table["split"] == "train", "cluster"].max()) + 1


def _difference(
    own: _Measured, other: _Measured | None, config: IntervalConfig
) -> dict[str, float]:
    """Return how far a method is from the control's, where both have seeds and rows in common."""
    gap = dict.fromkeys(("difference", "difference_low", "difference_high"), np.nan)
    if other is None:
        return gap
    runs = own.nll.index.intersection(other.nll.index)
    ids = own.nll.columns.intersection(other.nll.columns)
    if runs.empty or ids.empty:
        return gap
    apart = own.nll.loc[runs, ids] - other.nll.loc[runs, ids]
    return _estimate("difference", apart, own.tokens[ids], config)


def _estimate(
    name: str, values: pd.DataFrame, tokens: "pd.Series[float]", config: IntervalConfig
) -> dict[str, float]:
    """Return Σ values / Σ tokens with its ends, seeds and rows resampled across each other.

    Parameters
    ----------
    values : DataFrame, shape (S, n)
        Per seed and row.
    tokens : Series, shape (n,)
        Tokens of each row.
    """
    table = values.to_numpy(float)
    weights = np.broadcast_to(tokens.to_numpy(float), table.shape)
    bootstrap = Bootstrap(config.confidence, config.resamples)
    summed, totals = bootstrap.sums(np.stack([table, weights]))
    low, high = bootstrap.interval(summed / totals)
    point = values.mean().sum() / tokens.sum()
    return {name: float(point), f"{name}_low": low, f"{name}_high": high}


def _draw(table: pd.DataFrame, axes: Sequence[str]) -> Figure:
    """Draw the method that a library is for: routed, where there is one."""
    method = ROUTED if ROUTED in set(table["method"]) else table["method"].iloc[-1]
    rows = table[table["method"] == method].sort_values("nll", ascending=False)
    names = [" ".join(_short(row[axis]) for axis in axes) for _, row in rows.iterrows()]
    label = f"{method}: held-out NLL per response token (nats)"
    return draw_estimates(names, rows[["nll", "nll_low", "nll_high"]].to_numpy(float), label)


def _short(value: Any) -> str:  # noqa: ANN401
    return MISSING if pd.isna(value) else str(value).rpartition("/")[2]


def _notes(control: Mapping[str, Any], config: IntervalConfig) -> tuple[str, ...]:
    notes = [
        f"Intervals hold {config.confidence:.0%} of {config.resamples} bootstrap resamples of the "
        "held-out rows and, where a setting ran with several seeds, of those; differences are "
        "paired row by row, not corrected for their number."
    ]
    if control:
        named = ", ".join(f"{name} = {value}" for name, value in control.items())
        notes.append(f"Differences are to the same method with {named}; negative is better.")
    return tuple(notes)


for _name, _study in {
    "clustering": Study(
        "embedding model, clusterer and number of clusters, against random clusters",
        {
            "embed.model": EMBEDDERS,
            "cluster.method": (
                "kmeans", "hdbscan", "hidden-states", "gradients", "lora-parameters", "random"
            ),
            "cluster.k": (4, 8),
        },
        compare_methods,
        control={"cluster.method": "random"},
    ),
    "clusters": Study(
        "number of clusters", {"cluster.k": (1, 2, 4, 8, 12)}, compare_methods,
        control={"cluster.k": 1},
    ),
    "ranks": Study(
        "CP rank and LoRA rank, alpha twice the latter",
        {
            "factorise.rank": (4, 8, 16, 32),
            "train.r,train.alpha": ((4, 8), (8, 16), (16, 32)),
        },
        compare_methods,
    ),
    "sample-rows": Study(
        "number of sample rows that inform the merge",
        {"merge.sample_rows": (1, 2, 4, 8, 16, 32)},
        compare_methods,
    ),
}.items():  # fmt: skip
    studies.register(_name)(_study)
