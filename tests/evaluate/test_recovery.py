import numpy as np
import pandas as pd
import pytest

import tclora.evaluate.statistics
from tclora.evaluate.recovery import recovery, summarise

TOKENS = {"a": 2, "b": 3, "c": 5, "d": 1}
CLUSTERS = {"a": 0, "b": 0, "c": 1, "d": 1}


def frame(**nll):
    """Items of methods; each maps to NLL per token by row, one number standing for all rows."""
    rows = []
    for method, per_token in nll.items():
        for name, tokens in TOKENS.items():
            value = per_token[name] if isinstance(per_token, dict) else per_token
            rows.append(
                (method, "test", f"task {name}", CLUSTERS[name], name, value * tokens, tokens)
            )
    columns = ["method", "split", "task", "cluster", "id", "nll", "tokens"]
    return pd.DataFrame(rows, columns=columns).assign(correct=np.nan)


def many(n=200, seed=0, **means):
    """Items with noise that the methods share, as they do when measured on the same rows."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.3, n)
    parts = [
        pd.DataFrame(
            {
                "method": method, "split": "test", "task": "t", "cluster": np.arange(n) % 2,
                "id": [f"i{i}" for i in range(n)], "tokens": 4,
                "nll": 4 * (mean + shared + rng.normal(0, 0.05, n)),
                "correct": (rng.random(n) < 0.7).astype(float),
            }
        )
        for method, mean in means.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def table(items, **options):
    found = recovery(items, resamples=300, **options)
    return found.set_index(["method", "cluster"])["recovery"].to_dict()


def test_recovery_is_exact():
    items = frame(base=2.0, own=1.0, merged={"a": 1.0, "b": 1.0, "c": 1.5, "d": 1.5}, sum=3.0)
    assert table(items) == pytest.approx(
        {
            ("merged", "0"): 1.0, ("merged", "1"): 0.5, ("merged", "mean"): 0.75,
            ("merged", "worst"): 0.5, ("sum", "0"): -1.0, ("sum", "1"): -1.0,
            ("sum", "mean"): -1.0, ("sum", "worst"): -1.0,
        }
    )  # fmt: skip


def test_recovery_weighs_tokens_not_rows():
    items = frame(base=2.0, own=1.0, merged={"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0})
    assert table(items)["merged", "0"] == pytest.approx(2 / 5)  # 2 of the 5 tokens recovered


def test_a_cluster_whose_own_adapter_does_not_help_has_no_recovery():
    items = frame(base=2.0, own={"a": 2.0, "b": 2.5, "c": 1.0, "d": 1.0}, merged=1.5)
    found = table(items)
    assert np.isnan(found["merged", "0"])
    assert found["merged", "1"] == found["merged", "mean"] == found["merged", "worst"] == 0.5


def test_the_difference_of_two_methods_is_paired():
    items = many(base=2.0, own=1.0, one=1.2, other=1.3)
    plain = recovery(items).set_index(["method", "cluster"])
    found = recovery(items, against="other").set_index(["method", "cluster"])
    assert set(found.index.get_level_values("method")) == {"one"}
    for cluster in ("0", "1", "mean"):
        difference = found.loc[("one", cluster)]
        wanted = plain.loc[("one", cluster), "recovery"] - plain.loc[("other", cluster), "recovery"]
        assert difference["recovery"] == pytest.approx(wanted)
        assert difference["low"] < wanted < difference["high"]
        # The items' own noise, far above that of the methods, does not enter.
        assert difference["high"] - difference["low"] < 0.03


def test_no_cluster_with_a_recovery_gives_none():
    found = recovery(frame(base=1.0, own=1.5, merged=1.2), resamples=50)
    assert found[["recovery", "low", "high"]].isna().all(axis=None)


def test_the_order_of_a_methods_rows_does_not_matter():
    items = many(base=2.0, own=1.0, merged=1.4)
    merged = items[items["method"] == "merged"][::-1]
    shuffled = pd.concat([items[items["method"] != "merged"], merged])
    pd.testing.assert_frame_equal(recovery(shuffled), recovery(items))


def test_only_the_test_split_counts():
    items = many(base=2.0, own=1.0, merged=1.4)
    other = items.assign(split="ood", nll=0.0)
    pd.testing.assert_frame_equal(recovery(pd.concat([items, other])), recovery(items))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(25):
        items = many(60, seed, base=2.0, own=1.0, merged=1.5)
        found = recovery(items, confidence=0.9, resamples=300).set_index("cluster").loc["0"]
        hits += found["low"] <= 0.5 <= found["high"]
    assert 18 <= hits <= 25  # 22.5 expected


def test_intervals_shrink_with_the_level_and_hold_the_point():
    items = many(base=2.0, own=1.0, merged=1.4)
    wide = recovery(items, confidence=0.99).set_index("cluster")
    narrow = recovery(items, confidence=0.5).set_index("cluster")
    for name in ("0", "1", "mean"):
        assert wide.loc[name, "low"] < narrow.loc[name, "low"] < wide.loc[name, "recovery"]
        assert wide.loc[name, "recovery"] < narrow.loc[name, "high"] < wide.loc[name, "high"]


def test_the_worst_has_no_interval():
    """Five clusters recover alike: percentiles of the minimum would hardly ever cover it."""
    items = many(base=2.0, own=1.0, merged=1.4)
    items["cluster"] = items.groupby("method").cumcount() % 5
    worst = recovery(items).set_index("cluster").loc["worst"]
    assert worst[["low", "high"]].isna().all()
    assert worst["recovery"] < 0.6


def test_every_row_says_how_many_items_it_rests_on():
    items = frame(base=2.0, own=1.0, merged={"a": 1.0, "b": 1.0, "c": 1.5, "d": 1.5})
    items = items[items["id"] != "b"]
    found = recovery(items, resamples=50).set_index("cluster")["n"]
    assert found.to_dict() == {"0": 1, "1": 2, "mean": 3, "worst": 2}


def test_rows_without_a_recovery_do_not_count():
    items = frame(base=2.0, own={"a": 2.0, "b": 2.5, "c": 1.0, "d": 1.0}, merged=1.5)
    found = recovery(items, resamples=50).set_index("cluster")["n"]
    assert found.to_dict() == {"0": 2, "1": 2, "mean": 2, "worst": 2}


def test_pairing_makes_the_intervals_narrow():
    """Noise that base, method and own share must cancel."""
    found = recovery(many(base=2.0, own=1.0, merged=1.4)).set_index("cluster").loc["mean"]
    assert found["high"] - found["low"] < 0.05
    assert 0.55 < found["recovery"] < 0.65


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_size_of_chunks_changes_nothing(monkeypatch, chunk):
    items = many(base=2.0, own=1.0, merged=1.4)
    whole = summarise(items, resamples=250), recovery(items, resamples=250)
    monkeypatch.setattr(tclora.evaluate.statistics, "CHUNK", chunk)
    pd.testing.assert_frame_equal(summarise(items, resamples=250), whole[0])
    pd.testing.assert_frame_equal(recovery(items, resamples=250), whole[1])


def test_the_seed_decides_the_intervals_not_the_figures():
    items = many(base=2.0, own=1.0, merged=1.4)
    a, b, c = (recovery(items, resamples=100, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(a, b)
    assert (a["low"] != c["low"]).all()
    pd.testing.assert_series_equal(a["recovery"], c["recovery"])


def test_summaries_of_all_tasks_and_clusters():
    items = frame(base={"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    items.loc[items["id"] == "d", "task"] = None
    items["correct"] = [1.0, 0.0, np.nan, 1.0]
    found = summarise(items, resamples=100).set_index(["group_kind", "group"])
    assert found.loc[("all", "all"), "nll"] == pytest.approx((2 + 6 + 15 + 4) / 11)
    assert found.loc[("all", "all"), "accuracy"] == pytest.approx(2 / 3)
    assert found.loc[("all", "all"), "n"] == 4
    assert found.loc[("cluster", "0"), "nll"] == pytest.approx(8 / 5)
    assert found.loc[("task", "task c"), "nll"] == 3
    assert np.isnan(found.loc[("task", "task c"), "accuracy"])
    assert ("task", "None") not in found.index
    low, high = (found.loc[("all", "all"), f"nll_{end}"] for end in ("low", "high"))
    assert 1 <= low < found.loc[("all", "all"), "nll"] < high <= 4


def test_methods_and_splits_are_kept_apart():
    items = many(base=2.0, own=1.0)
    items.loc[items["cluster"] == 1, "split"] = "ood"
    found = summarise(items, resamples=20)
    overall = found[found["group_kind"] == "all"]
    pairs = set(zip(overall["method"], overall["split"], strict=True))
    assert pairs == {("base", "test"), ("base", "ood"), ("own", "test"), ("own", "ood")}


def several_seeds(spread, n=200, count=3, seed=0, **means):
    """Items of several training seeds; all methods but the base are off by a draw per seed."""
    rng = np.random.default_rng(seed)
    items = many(n, seed, **means)
    parts = []
    for number in range(count):
        moved = items["nll"] + 4 * rng.normal(0, spread) * (items["method"] != "base")
        parts.append(items.assign(seed=number, nll=moved))
    return pd.concat(parts, ignore_index=True)


def test_equal_seeds_give_what_one_gives():
    items = many(base=2.0, own=1.0, merged=1.4)
    same = pd.concat([items.assign(seed=number) for number in range(3)])
    for function in (summarise, recovery):
        one, three = function(items, resamples=100), function(same, resamples=100)
        assert (three["seeds"] == 3).all()
        pd.testing.assert_frame_equal(three.assign(seeds=1), one)


def test_seeds_that_differ_widen_the_intervals():
    alike = recovery(several_seeds(0.001, base=2.0, own=1.0, merged=1.4)).set_index("cluster")
    apart = summarise(several_seeds(0.4, base=2.0, own=1.0, merged=1.4))
    calm = summarise(several_seeds(0.001, base=2.0, own=1.0, merged=1.4))
    width = {
        name: (table["nll_high"] - table["nll_low"]).to_numpy()[table["method"] == "merged"]
        for name, table in (("apart", apart), ("calm", calm))
    }
    assert (width["apart"] > 2 * width["calm"]).all()
    assert alike.loc["mean", "recovery"] == pytest.approx(0.6, abs=0.02)


def test_the_seeds_part_of_the_mean_is_that_of_every_cluster():
    """Training seeds belong to all clusters: to average these does not average the seeds out."""
    parts = []
    for seed, merged in enumerate((1.5, 1.3, 1.1)):
        items = pd.concat(
            [
                frame(base=2.0, own=1.0, merged=merged).assign(cluster=cluster, seed=seed)
                for cluster in range(6)
            ]
        )
        parts.append(items.assign(id=items["id"] + items["cluster"].astype(str)))
    found = recovery(pd.concat(parts)).set_index("cluster")
    for cluster in ("0", "5", "mean"):
        assert found.loc[cluster, ["low", "high"]].tolist() == pytest.approx([0.5, 0.9])


def test_seeds_must_measure_the_same_items():
    items = pd.concat([many(base=2.0, own=1.0, merged=1.4).assign(seed=s) for s in range(2)])
    with pytest.raises(ValueError, match="every seed must measure the same items"):
        recovery(items.iloc[:-1], resamples=10)


def test_every_figure_has_its_number_of_items():
    items = frame(base=1.0, own=1.0)
    items["correct"] = [1.0, np.nan, 0.0, 1.0] * 2
    items.loc[items["id"] == "a", "nll"] = np.nan
    found = summarise(items, resamples=20).set_index(["method", "group_kind"])
    row = found.loc[("base", "all")]
    assert (row["n"], row["nll_n"], row["accuracy_n"]) == (4, 3, 3)


def test_length_normalised_accuracy_and_skills_have_lines_of_their_own():
    items = many(n=40, base=2.0).assign(
        correct_norm=[1.0, 0.0] * 15 + [np.nan] * 10,  # ten rows without choices
        skills=["a+b"] * 20 + [None] * 20,
    )
    found = summarise(items, resamples=200).set_index(["group_kind", "group"])
    whole = found.loc["all", "all"]
    assert whole["accuracy_norm"] == 0.5
    assert whole["accuracy_norm_low"] < 0.5 < whole["accuracy_norm_high"]
    assert found.loc["skills", "a+b"]["n"] == 20
    assert found.loc["skills", "a+b"]["accuracy"] == items["correct"][:20].mean()


def test_items_without_nll_count_in_the_accuracy_alone():
    items = many(n=20, base=2.0)
    items.loc[:9, "nll"] = np.nan
    (whole,) = summarise(items, resamples=50).query("group_kind == 'all'").to_dict("records")
    kept = items[10:]
    assert whole["nll"] == pytest.approx(kept["nll"].sum() / kept["tokens"].sum())
    assert (whole["n"], whole["accuracy"]) == (20, items["correct"].mean())


def test_a_share_of_nothing_has_an_interval_that_n_items_allow():
    items = frame(base=1.0, own=1.0).assign(correct=0.0)
    row = summarise(items, resamples=20).iloc[0]
    assert (row["accuracy"], row["accuracy_low"]) == (0, 0)
    assert row["accuracy_high"] == pytest.approx(1 - 0.025 ** (1 / 4))
