"""The study of stability: whether other seeds and other samples of rows give the same clusters."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tclora.cluster.centroids import NOISE
from tclora.config import IntervalConfig
from tclora.study.cells import Cell
from tclora.study.plot import draw_estimates
from tclora.study.registry import Outcome, Study, studies

_SEED, _SAMPLE = "seed", "data.seed"


def compare_clusters(
    cells: Sequence[Cell], control: Mapping[str, Any], config: IntervalConfig
) -> Outcome:
    """Summarise how well the clusters of every two cells of a setting agree.

    Returns
    -------
    Outcome
        Table with a column per other axis, and between ("seeds": same rows; "samples": same seed),
        pairs, clusters (mean K), ari (mean adjusted Rand index over the pairs, on training rows
        that both have), lowest and highest.
    """
    rows = []
    for key, group in _by_setting(cells).items():
        labels = {id(cell): _labels(cell) for cell in group}
        for between, pairs in _pairs(group).items():
            found = [_agreement(labels[id(a)], labels[id(b)]) for a, b in pairs]
            if found:
                rows.append(
                    {
                        **dict(key),
                        "between": between,
                        "pairs": len(found),
                        "clusters": np.mean([len(set(part) - {NOISE}) for part in labels.values()]),
                        "ari": np.mean(found),
                        "lowest": min(found),
                        "highest": max(found),
                    }
                )
    table = pd.DataFrame(rows)
    axes = list(dict(next(iter(_by_setting(cells)))))
    names = [" ".join(str(row[axis]) for axis in [*axes, "between"]) for _, row in table.iterrows()]
    estimates = table[["ari", "lowest", "highest"]].to_numpy(float)
    figure = draw_estimates(names, estimates, "adjusted Rand index, mean and range over pairs")
    return Outcome(table, figure, ("Ranges are the lowest and highest pair, no intervals.",))


def _by_setting(cells: Sequence[Cell]) -> dict[tuple[tuple[str, Any], ...], list[Cell]]:
    groups: dict[tuple[tuple[str, Any], ...], list[Cell]] = {}
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


def _agreement(one: "pd.Series[int]", two: "pd.Series[int]") -> float:
    from sklearn.metrics import adjusted_rand_score

    both = one.index.intersection(two.index)
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
    )
)
