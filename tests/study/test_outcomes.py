"""What studies make of their cells, on tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from tclora.config import Config, IntervalConfig
from tclora.errors import ConfigError
from tclora.study.agreement import compare_clusters
from tclora.study.cells import make_cells
from tclora.study.methods import compare_methods
from tclora.study.registry import studies
from tclora.study.write import StudyLayout, write_study

CONFIG = IntervalConfig(resamples=400)
ROWS, TOKENS = 60, 4


def cells_of(folder, axes, write):
    cells = make_cells(Config(), axes, folder)
    for cell in cells:
        cell.layout.evaluation.folder.mkdir(parents=True)
        write(cell)
    return cells


def write_clusters(cell, labels, split="train"):
    pd.DataFrame(
        {"id": [f"r{i}" for i in range(len(labels))], "split": split, "cluster": labels}
    ).to_parquet(cell.layout.clusters)


@pytest.fixture
def measured(tmp_path):
    """Clusters of three clusterers on two seeds; text is 0.5 nats a token better than random."""
    gain = {"kmeans": 0.5, "gradients": 0.0, "hdbscan": 0.1, "random": 0.0}

    def write(cell):
        rng = np.random.default_rng(cell.config.seed + 5 * len(cell.config.cluster.method))
        level = np.random.default_rng(0).uniform(1, 9, ROWS)  # rows differ more than methods
        parts = []
        for method in ("base", "own", "tc-lora", "routed"):
            better = gain[cell.config.cluster.method] * (method == "routed")
            nll = TOKENS * (level - better + rng.normal(0, 0.1, ROWS))
            part = {"id": [f"r{i}" for i in range(ROWS)], "method": method, "split": "test"}
            parts.append(pd.DataFrame({**part, "nll": nll, "tokens": TOKENS}))
            parts.append(parts[-1].assign(split="ood", nll=1e9))
        items = pd.concat(parts).sample(frac=1, random_state=cell.config.seed)
        items.to_parquet(cell.layout.evaluation.items)
        write_clusters(cell, np.arange(12) % (3 if cell.config.cluster.method == "hdbscan" else 2))

    axes = {
        "cluster.method": ["kmeans", "gradients", "hdbscan", "random"],
        "cluster.k": [2, 4],
        "seed": [0, 1],
    }
    return cells_of(tmp_path, axes, write)


def row_of(table, **values):
    for key, value in values.items():
        column = table[key.replace("__", ".")]
        table = table[column.isna() if value is None else column == value]
    (row,) = table.to_dict("records")
    return row


def test_differences_are_paired_and_seeds_count_as_one_setting(measured):
    outcome = compare_methods(measured, {"cluster.method": "random"}, CONFIG)
    table = outcome.table
    assert len(table) == 7 * 3  # 4 clusterers, 2 K but one that finds K; three methods
    better = row_of(table, cluster__method="kmeans", cluster__k=4, method="routed")
    assert (better["n"], better["seeds"], better["clusters"]) == (ROWS, 2, 2)
    assert better["difference"] == pytest.approx(-0.5, abs=0.05)
    assert better["difference_high"] < -0.4
    assert better["difference_high"] - better["difference_low"] < 0.2  # paired: levels cancel
    assert better["nll_high"] - better["nll_low"] > 0.5
    same = row_of(table, cluster__method="gradients", cluster__k=2, method="routed")
    assert same["difference_low"] < 0 < same["difference_high"]
    found = row_of(table, cluster__method="hdbscan", cluster__k=None, method="routed")
    assert found["difference"] == pytest.approx(-0.1, abs=0.05)
    assert found["clusters"] == 3
    control = row_of(table, cluster__method="random", cluster__k=4, method="own")
    assert np.isnan(control["difference"])
    assert any("cluster.method = random" in note for note in outcome.notes)


def test_seeds_widen_the_interval(tmp_path):
    def write(cell):
        shift = 0.4 * cell.config.seed if cell.config.cluster.k == 4 else 0
        nll = np.full(ROWS, TOKENS * (2.0 + shift))
        rows = {"id": [f"r{i}" for i in range(ROWS)], "method": "own", "split": "test"}
        pd.DataFrame({**rows, "nll": nll, "tokens": TOKENS}).to_parquet(
            cell.layout.evaluation.items
        )
        write_clusters(cell, np.arange(4) % 2)

    cells = cells_of(tmp_path, {"cluster.k": [2, 4], "seed": [0, 1, 2]}, write)
    table = compare_methods(cells, {"cluster.k": 2}, CONFIG).table.set_index("cluster.k")
    assert table.loc[2, ["nll", "nll_low", "nll_high"]].tolist() == pytest.approx([2, 2, 2])
    assert table.loc[4, "difference"] == pytest.approx(0.4)
    assert table.loc[4, "difference_low"] < 0.2  # nearly all three the first seed
    assert table.loc[4, "difference_high"] > 0.6


def test_the_interval_of_two_seeds_reaches_both(tmp_path):
    """One of two is drawn, with twice its weight; two of two give their mean half of the time."""

    def write(cell):
        nll = TOKENS * (2.0 + cell.config.seed)
        rows = {"id": [f"r{i}" for i in range(ROWS)], "method": "own", "split": "test"}
        items = pd.DataFrame({**rows, "nll": nll, "tokens": TOKENS})
        items.to_parquet(cell.layout.evaluation.items)
        write_clusters(cell, np.arange(4) % 2)

    cells = cells_of(tmp_path, {"cluster.k": [2], "seed": [0, 1]}, write)
    half = IntervalConfig(resamples=400, confidence=0.4)
    table = compare_methods(cells, {}, half).table
    assert table.loc[0, ["nll_low", "nll_high"]].tolist() == pytest.approx([2, 3])


def test_training_seeds_of_a_cell_are_paired_and_are_no_further_rows(tmp_path):
    def write(cell):
        seeds = [0, 1, 2] if cell.config.cluster.k == 2 else [2, 0]  # in another order, one missing
        rows = {"id": [f"r{i}" for i in range(ROWS)], "method": "own", "split": "test"}
        parts = [
            pd.DataFrame({**rows, "nll": TOKENS * (2.0 + seed), "tokens": TOKENS, "seed": seed})
            for seed in seeds
        ]
        pd.concat(parts).to_parquet(cell.layout.evaluation.items)
        write_clusters(cell, np.arange(4) % 2)

    cells = cells_of(tmp_path, {"cluster.k": [2, 4]}, write)
    table = compare_methods(cells, {"cluster.k": 2}, CONFIG).table.set_index("cluster.k")
    assert table["n"].tolist() == [ROWS, ROWS]
    assert table["seeds"].tolist() == [3, 2]
    assert table.loc[2, "nll_high"] > 3.5  # seeds are resampled whole
    found = table.loc[4, ["difference", "difference_low", "difference_high"]].tolist()
    assert found == [0, 0, 0]  # the same seeds have the same values


def test_values_may_be_lists_and_of_several_types(tmp_path):
    axes = {
        "cluster.k": ["auto", 4],
        "train.target_modules": ["all-linear", ["q_proj"]],
        "seed": [0, 1],
    }
    cells = cells_of(tmp_path, axes, lambda cell: write_clusters(cell, np.arange(8) % 2))
    assert [cell.config.train.target_modules for cell in cells[1:3]] == ["all-linear", ("q_proj",)]
    layout = StudyLayout(tmp_path / "study")
    write_study(layout, "agreement", compare_clusters(cells, {}, CONFIG))
    table = pd.read_parquet(layout.parquet)
    assert table["cluster.k"].tolist() == ["auto", "auto", "4", "4"]
    assert table["train.target_modules"].tolist() == ["all-linear", "['q_proj']"] * 2


def test_agreement_tells_seeds_from_samples(tmp_path):
    def write(cell):
        n = 40
        labels = np.arange(n) % 2
        if cell.config.seed:  # another seed renumbers the clusters
            labels = 1 - labels
        if cell.config.data.seed:  # another sample divides at random
            labels = np.random.default_rng(cell.config.data.seed).integers(0, 2, n)
        write_clusters(cell, labels)

    axes = {"cluster.method": ["kmeans"], "data.seed": [0, 1, 2], "seed": [0, 1]}
    outcome = compare_clusters(cells_of(tmp_path, axes, write), {}, CONFIG)
    seeds = row_of(outcome.table, between="seeds")
    assert (seeds["pairs"], seeds["ari"], seeds["clusters"]) == (3, 1, 2)
    samples = row_of(outcome.table, between="samples")
    assert samples["pairs"] == 6
    assert -0.1 < samples["lowest"] <= samples["ari"] <= samples["highest"] < 0.3


def test_agreement_counts_the_training_rows_that_both_have(tmp_path):
    def write(cell):
        seed = cell.config.data.seed
        labels = pd.Series([0, 0, 1, 1, 0, 1], index=list("abcdef"))
        labels = labels.drop("ab"[seed])  # each sample lacks another row
        table = pd.DataFrame({"id": labels.index, "split": "train", "cluster": labels.to_numpy()})
        table.loc[table["id"] == "f", ["split", "cluster"]] = ["test", seed]
        table.to_parquet(cell.layout.clusters)

    axes = {"data.seed": [0, 1], "seed": [0]}
    outcome = compare_clusters(cells_of(tmp_path, axes, write), {}, CONFIG)
    assert row_of(outcome.table, between="samples")["ari"] == 1


def test_agreement_of_nothing_is_a_stated_gap(tmp_path):
    def write(cell):  # samples 0 and 1 share no row, 1 and 2 share one
        first = {0: 0, 1: 10, 2: 19}[cell.config.data.seed]
        ids = [f"r{i}" for i in range(first, first + 10)]
        table = pd.DataFrame({"id": ids, "split": "train", "cluster": np.arange(10) % 2})
        table.to_parquet(cell.layout.clusters)

    cells = cells_of(tmp_path, {"data.seed": [0, 1, 2], "seed": [0]}, write)
    outcome = compare_clusters(cells, {}, CONFIG)
    row = row_of(outcome.table, between="samples")
    assert row["pairs"] == 0
    assert np.isnan([row["ari"], row["lowest"], row["highest"]]).all()
    assert any("pairs is 0" in note for note in outcome.notes)
    alone = compare_clusters(cells[:1], {}, CONFIG)  # the others have failed
    assert row_of(alone.table, between=None)["pairs"] == 0
    write_study(StudyLayout(tmp_path / "study"), "nothing", alone)


def test_agreement_needs_cells_to_compare(tmp_path):
    check = studies["agreement"].check
    axes = {"cluster.method": ["kmeans", "random"], "data.seed": [0], "seed": [3]}
    with pytest.raises(ConfigError, match=r"axis seed or data\.seed must have two .* seed=\[3\]"):
        check(make_cells(Config(), axes, tmp_path))
    check(make_cells(Config(), {**axes, "seed": [3, 4]}, tmp_path))


def test_table_plot_and_summary_are_written(measured, tmp_path):
    outcome = compare_methods(measured, {"cluster.method": "random"}, CONFIG)
    layout = StudyLayout(tmp_path / "study")
    write_study(layout, "clusters: which", outcome)
    pd.testing.assert_frame_equal(pd.read_parquet(layout.parquet), outcome.table)
    assert len(pd.read_csv(layout.csv)) == len(outcome.table)
    text = layout.summary.read_text()
    best = row_of(outcome.table, cluster__method="kmeans", cluster__k=2, method="routed")
    cell = f"{best['nll']:.3f} [{best['nll_low']:.3f}, {best['nll_high']:.3f}]"
    assert cell in text
    assert "![](study.svg)" in text
    assert layout.plot.read_bytes().lstrip().startswith(b"<?xml")
