import numpy as np
import pandas as pd
import pytest

import tclora.evaluate.winners
from tclora.evaluate.statistics import Difference
from tclora.evaluate.winners import winners
from tests.evaluate.test_recovery import many


def of(table, **place):
    for name, value in place.items():
        table = table[table[name] == value]
    return table.set_index("method")


def test_the_best_and_its_ties():
    items = many(base=2.0, own=1.0, good=1.2, same=1.2001, bad=1.6, joint=1.0)
    found = of(winners(items, resamples=500), metric="recovery", group="mean")
    assert set(found["best"]) <= {"good", "same"}
    best = found["best"].iloc[0]
    other = "same" if best == "good" else "good"
    assert set(found.index) == {other, "bad"}  # references are no merges
    assert found["tie"].to_dict() == {other: True, "bad": False}
    assert found.loc["bad", "difference"] == pytest.approx(0.4, abs=0.02)
    assert found.loc["bad", "low"] < found.loc["bad", "difference"] < found.loc["bad", "high"]
    assert (found["n"] == 200).all()


def test_lower_nll_and_higher_accuracy_win():
    items = many(base=2.0, own=1.0, good=1.2, bad=1.6)
    rng = np.random.default_rng(0)
    share = items["method"].map({"base": 0.1, "own": 0.9, "good": 0.8, "bad": 0.2})
    items["correct"] = (rng.random(len(items)) < share).astype(float)
    found = winners(items, resamples=500)
    for metric in ("nll", "accuracy"):
        row = of(found, metric=metric, group_kind="all").loc["bad"]
        assert row["best"] == "good"
        assert row["difference"] > 0
        assert not row["tie"]
    assert set(found["group_kind"]) == {"all", "task", "cluster"}


def test_one_merge_alone_wins_nothing():
    assert winners(many(base=2.0, own=1.0, merged=1.4), resamples=20).empty


def test_a_winner_is_rarely_claimed_where_there_is_none():
    """Ten equal merges: the best of them is told apart from another in few of the draws."""
    claims = 0
    for seed in range(30):
        items = many(40, seed, base=2.0, own=1.0, **{f"m{i}": 1.4 for i in range(10)})
        items = items.drop(columns="correct").assign(cluster=0, task=None)
        found = of(winners(items, resamples=200), metric="recovery", group="mean")
        claims += not found["tie"].all()
    assert claims <= 5  # 1.5 expected


def test_seeds_count():
    items = pd.concat([many(base=2.0, own=1.0, good=1.2, bad=1.6).assign(seed=s) for s in range(3)])
    found = winners(items, resamples=100)
    assert (found["seeds"] == 3).all()
    assert set(of(found, metric="recovery", group="mean")["n"]) == {200}


def answered(n, **right):
    """Items of merges that answer all of n questions rightly, or none."""
    parts = [many(n, **{name: 1.0}).assign(correct=share) for name, share in right.items()]
    return pd.concat(parts, ignore_index=True)


def test_two_items_do_not_make_a_winner():
    found = winners(answered(2, good=1.0, bad=0.0), resamples=50)
    row = of(found, metric="accuracy", group_kind="all").loc["bad"]
    assert (row["difference"], row["p"], row["tie"]) == (1.0, 0.5, True)
    assert row["low"] < 0 < row["high"]
    many_items = winners(answered(20, good=1.0, bad=0.0), resamples=50)
    row = of(many_items, metric="accuracy", group_kind="all").loc["bad"]
    assert not row["tie"]
    assert 0 < row["low"] < row["high"] == 1


def test_clusters_of_one_item_make_no_winner_of_their_mean():
    items = many(8, base=2.0, own=1.0, good=1.2, bad=1.6).assign(cluster=lambda t: t["id"].str[1:])
    items["cluster"] = items["cluster"].astype(int)
    row = of(winners(items, resamples=50), metric="recovery", group="mean").loc["bad"]
    assert (row["p"], row["tie"]) == (1.0, True)


def test_what_has_no_p_is_a_tie(monkeypatch):
    unknown = Difference(0.4, np.nan, np.nan, np.nan)
    monkeypatch.setattr(tclora.evaluate.winners, "difference", lambda *_, **__: unknown)
    assert winners(many(base=2.0, own=1.0, good=1.2, bad=1.6), resamples=50)["tie"].all()
