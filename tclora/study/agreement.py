"""The study of stability: whether other seeds and other samples of rows give the same clusters."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tclora.cluster.centroids import NOISE
from tclora.config import IntervalConfig
from tclora.errors import ConfigError
from tclora.study.cells import Cell
from tclora.study.plot import draw_estimates
from tclora.study.registry import Outcome, Study, studies

_SEED, _SAMPLE = "seed", "data.seed"
_Setting = tuple[tuple[str, Any], ...]


def compare_clusters(
    cells: Sequence[Cell], control: Mapping[str, Any], config: IntervalConfig
) -> Outcome:
    """Summarise how well the clusters of every two cells of a setting agree.

    Returns
    -------
    Outcome
        Table with a column per other axis, and between ("seeds": same rows; "samples": same seed;
        none where a setting has no two such cells), pairs (of cells with rows in common), clusters
        (mean K), ari (mean adjusted Rand index over the pairs, on training rows that both have;
        none without a pair), lowest and highest.
    """
    settings = _by_setting(cells)
    table = pd.DataFrame([row for key, group in settings.items() for row in _compare(key, group)])
    axes = list(dict(next(iter(settings))))
    told = table[table["pairs"] > 0]
    names = [" ".join(str(row[axis]) for axis in [*axes, "between"]) for _, row in told.iterrows()]
    estimates = told[["ari", "lowest", "highest"]].to_numpy(float)
    figure = draw_estimates(names, estimates, "adjusted Rand index, mean and range over pairs")
    notes = ["Ranges are the lowest and highest pair, no intervals."]
    if len(told) < len(table):
        notes.append(
            "Where pairs is 0, no two finished cells differ in seed or sample alone and have two "
            "or more training rows in common."
        )
    return Outcome(table, figure, tuple(notes))


def check_pairs(cells: Sequence[Cell]) -> None:
    """Refuse cells of which no two can be compared.

    Raises
    ------
    ConfigError
        If no two differ in the seed, or in the sample, alone.
    """
    if not any(any(_pairs(group).values()) for group in _by_setting(cells).values()):
        got = {axis: list(dict.fromkeys(cell.values.get(axis) for cell in cells))
               for axis in (_SEED, _SAMPLE)}  # fmt: skip
        raise ConfigError(
            f"axis {_SEED} or {_SAMPLE} must have two values or more, which are compared, got "
            f"{_SEED}={got[_SEED]}, {_SAMPLE}={got[_SAMPLE]}; give --axis '{_SEED}=[0, 1]'"
        )


def _compare(key: _Setting, group: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a setting's rows of the table."""
    labels = {id(cell): _labels(cell) for cell in group}
    rows = []
    compared: dict[str | None, list[tuple[Cell, Cell]]]
    compared = {name: pairs for name, pairs in _pairs(group).items() if pairs}
    for between, pairs in (compared or {None: []}).items():
        found = [_agreement(labels[id(a)], labels[id(b)]) for a, b in pairs]
        known = [value for value in found if value is not None]
        rows.append(
            {
                **dict(key),
                "between": between,
                "pairs": len(known),
                "clusters": np.mean([len(set(part) - {NOISE}) for part in labels.values()]),
                "ari": np.mean(known) if known else np.nan,
                "lowest": min(known, default=np.nan),
                "highest": max(known, default=np.nan),
            }
        )
    return rows


def _by_setting(cells: Sequence[Cell]) -> dict[_Setting, list[Cell]]:
    groups: dict[_Setting, list[Cell]] = {}
    for cell in cells:
        key = tuple(item for item in cell.values.items() if item[0] not in {_SEED, _SAMPLE})
        groups.setdefault(key, []).append(cell)
    return groups


def _pairs(cells: Sequence[Cell]) -> dict[str, list[tuple[Cell, Cell]]]:
    """Return the pairs of cells that differ in the seed, or in the sample, alone."""
    pairs = list(combinations(cells, 2))

    def apart(one: Cell, two: Cell, name: str) -> bool:
        return {key for key in one.values if one.values[key] != two.values[key]} == {name}

    return {
        "seeds": [pair for pair in pairs if apart(*pair, _SEED)],
        "samples": [pair for pair in pairs if apart(*pair, _SAMPLE)],
    }


def _labels(cell: Cell) -> "pd.Series[int]":
    table = pd.read_parquet(cell.layout.clusters, columns=["id", "split", "cluster"])
    return table[table["split"] == "train"].set_index("id")["cluster"]


def _agreement(one: "pd.Series[int]", two: "pd.Series[int]") -> float | None:
    """Return the adjusted Rand index; None for fewer than two rows in common, always 1 there."""
    from sklearn.metrics import adjusted_rand_score

    both = one.index.intersection(two.index)
    if len(both) < 2:
        return None
    return float(adjusted_rand_score(one[both], two[both]))


studies.register("agreement")(
    Study(
        "agreement of the clusters under other seeds and other samples of the rows",
        {
            "cluster.method": ("kmeans", "hdbscan"),
            _SAMPLE: (0, 1, 2),
            _SEED: (0, 1, 2),
        },
        compare_clusters,
        until="prepare",
        check=check_pairs,
    )
)
