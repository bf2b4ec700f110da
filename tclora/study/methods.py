"""Studies of what is learned: held-out NLL of every method in every cell, against a control.

Symbols: S seeds, n held-out rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tclora.config import IntervalConfig
from tclora.library.names import OWN, ROUTED
from tclora.report.notation import MISSING
from tclora.study.cells import Cell
from tclora.study.plot import draw_estimates
from tclora.study.registry import Outcome, Study, studies

SEED = "seed"
EMBEDDERS = ("all-minilm-l6-v2", "smollm2-135m-instruct")
_Array = NDArray[np.float64]
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
        method in the control; negative is better) with its ends. Seeds of a setting count as one.
    """
    settings = _by_setting(cells)
    items = {key: _items(group) for key, group in settings.items()}
    rows = []
    for key, group in settings.items():
        against = _control_of(key, control, settings)
        for method in items[key]["method"].unique():
            own = _matrix(items[key], method)
            other = _matrix(items[against], method) if against and against != key else None
            rows.append(
                {
                    **dict(key),
                    "clusters": np.mean([_clusters(cell) for cell in group]),
                    "method": method,
                    "n": own["nll"].shape[1],
                    "seeds": len(group),
                    **_estimate("nll", own["nll"], own["tokens"], config),
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
    """Return the measured in-domain rows of a setting's cells, with a column for the cell."""
    parts = [
        pd.read_parquet(cell.layout.evaluation.items).assign(part=number)
        for number, cell in enumerate(cells)
    ]
    items = pd.concat(parts, ignore_index=True)
    primary = cells[0].config.merge.primary
    kept = items["method"].isin([OWN, primary, ROUTED]) & (items["split"] == "test")
    return items[kept]


def _matrix(items: pd.DataFrame, method: str) -> dict[str, _Array]:
    """Return a method's NLL (S, n) and the rows' tokens (n,), in the order of their ids."""
    rows = items[items["method"] == method].sort_values(["part", "id"])
    seeds = rows["part"].nunique()
    nll = rows["nll"].to_numpy(float).reshape(seeds, -1)
    return {"nll": nll, "tokens": rows["tokens"].to_numpy(float)[: nll.shape[1]]}


def _clusters(cell: Cell) -> int:
    table = pd.read_parquet(cell.layout.clusters, columns=["cluster", "split"])
    return int(table.loc[table["split"] == "train", "cluster"].max()) + 1


def _difference(
    own: Mapping[str, _Array], other: Mapping[str, _Array] | None, config: IntervalConfig
) -> dict[str, float]:
    if other is None:
        return _estimate("difference", np.full((1, 1), np.nan), np.ones(1), config)
    seeds = min(len(own["nll"]), len(other["nll"]))
    apart = own["nll"][:seeds] - other["nll"][:seeds]
    return _estimate("difference", apart, own["tokens"], config)


def _estimate(
    name: str, values: _Array, tokens: _Array, config: IntervalConfig
) -> dict[str, float]:
    """Return Σ values / Σ tokens with its ends, seeds and rows both resampled.

    Parameters
    ----------
    values : ndarray, shape (S, n)
        Per seed and row.
    tokens : ndarray, shape (n,)
        Tokens of each row.
    """
    seeds, rows = values.shape
    rng = np.random.default_rng(0)
    by_row = rng.multinomial(rows, np.full(rows, 1 / rows), config.resamples)  # (resamples, n)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), config.resamples)
    draws = np.einsum("bs,sn,bn->b", by_seed, values, by_row, optimize=True)
    draws = draws / (seeds * (by_row @ tokens))
    ends = np.quantile(draws, [(1 - config.confidence) / 2, (1 + config.confidence) / 2])
    point = values.mean(axis=0).sum() / tokens.sum()
    return {name: float(point), f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}


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
