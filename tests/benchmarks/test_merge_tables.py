import numpy as np
import pandas as pd
import pytest
from merge_tables import _beyond, _fewer, _tasks_alike


def test_every_other_task_counts_alike_and_differences_are_paired():
    rng = np.random.default_rng(0)
    rows = []
    for task, tokens, count in (("long", 100, 5), ("short", 1, 40)):
        for n in range(count):
            nll = rng.uniform(1, 3) * tokens
            for method, more in (("one", 0.0), ("other", 0.5)):
                rows.append({"id": f"{task}-{n}", "split": "ood", "task": task, "method": method,
                             "tokens": tokens, "nll": nll + more * tokens})  # fmt: skip
    items = pd.DataFrame(rows).assign(correct=0.0)
    items = pd.concat([items, items.assign(split="test", nll=100.0, id=items["id"] + "-test")])
    found = _tasks_alike(items, ["one", "other"])
    others = items[(items["split"] == "ood") & (items["method"] == "one")]
    sums = others.groupby("task")[["nll", "tokens"]].sum()
    assert found["one"][0] == pytest.approx((sums["nll"] / sums["tokens"]).mean())
    assert _beyond(found, "other", "one") == "0.500 [0.500, 0.500]"
    assert _beyond(found, "third", "one") == ""


def test_a_method_that_was_measured_on_fewer_rows_says_so():
    splits = ["test"] * 3 + ["ood"] * 2
    whole = pd.DataFrame({"id": range(5), "split": splits, "method": "base"})
    items = pd.concat([whole, whole.assign(method="all"), whole[1:].assign(method="some")])
    assert _fewer(items, "all") == ""
    assert _fewer(items, "some") == " (on 2 ood, 2 test)"
