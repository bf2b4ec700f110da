import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from tclora.evaluate.harm import correlate, harm_table, square, summarise_cross

NAMES = [f"cluster-{k}" for k in range(6)]


def pairs_of(table):
    first, second = np.triu_indices(len(table), k=1)
    return pd.DataFrame(
        {
            "first": [NAMES[i] for i in first], "second": [NAMES[j] for j in second],
            "measure": table[first, second],
        }
    )  # fmt: skip


def symmetric(rng, K=6):
    table = rng.normal(size=(K, K))
    return table + table.T


def frame(table):
    out = pd.DataFrame(table.copy(), index=NAMES[: len(table)], columns=NAMES[: len(table)])
    return out.where(~np.eye(len(table), dtype=bool))


def test_the_harm_of_an_added_adapter_is_the_rise_of_the_loss():
    rows = []
    for cluster in (0, 1):
        for adapter, added, per_token in (
            ("base", False, 3.0), ("cluster-0", False, 1.0), ("cluster-1", False, 1.0),
            (f"cluster-{1 - cluster}", True, 1.5 + cluster),
        ):  # fmt: skip
            rows += [
                (f"{cluster}{i}", cluster, adapter, added, per_token * (i + 1), i + 1)
                for i in range(5)
            ]
    columns = ["id", "cluster", "adapter", "added", "nll", "tokens"]
    found = summarise_cross(pd.DataFrame(rows, columns=columns), resamples=50)
    harm = harm_table(found, NAMES[:2])
    assert harm.loc["cluster-0", "cluster-1"] == pytest.approx(0.5)
    assert harm.loc["cluster-1", "cluster-0"] == pytest.approx(1.5)
    assert np.isnan(np.diag(harm)).all()
    base = found[found["adapter"] == "base"]
    assert base["change"].tolist() == pytest.approx([2.0, 2.0])
    assert (found["n"] == 5).all()


def test_the_correlation_is_scipys():
    rng = np.random.default_rng(0)
    measure, harm = symmetric(rng), rng.normal(size=(6, 6))
    off = ~np.eye(6, dtype=bool)
    found = correlate(frame(harm), pairs_of(measure), ["measure"], resamples=50).iloc[0]
    assert found["rho"] == pytest.approx(spearmanr(harm[off], measure[off]).statistic)
    assert (found["n"], found["clusters"]) == (30, 6)


def test_a_measure_that_tells_all_is_found_and_one_that_tells_nothing_is_not():
    rng = np.random.default_rng(1)
    measure = symmetric(rng)
    found = correlate(frame(np.exp(measure)), pairs_of(measure), ["measure"]).iloc[0]
    assert found["rho"] == pytest.approx(1)
    assert found["p"] == pytest.approx(1 / 720)
    assert found["low"] > 0.9
    p = [
        correlate(
            frame(symmetric(rng, 5)), pairs_of(symmetric(rng, 5)), ["measure"], resamples=1
        ).iloc[0]["p"]
        for _ in range(100)
    ]
    assert 0.35 < np.mean(p) < 0.65  # p is uniform where nothing is to be found
    assert np.mean(np.array(p) < 0.2) < 0.33


def test_too_few_clusters_have_no_interval():
    rng = np.random.default_rng(2)
    found = correlate(frame(symmetric(rng, 3)), pairs_of(symmetric(rng, 3)), ["measure"]).iloc[0]
    assert np.isnan([found["low"], found["high"]]).all()
    assert found["n"] == 6


def test_a_square_is_symmetric():
    table = square(pairs_of(symmetric(np.random.default_rng(3))), NAMES, "measure")
    assert table.equals(table.T)
