"""Two results item by item, of one training and of several."""

import numpy as np
import pandas as pd
import pytest

from tclora.errors import ConfigError, DataError
from tclora.evaluate.compare import compare_items

RNG = np.random.default_rng(0)


def results(right, task="t"):
    """Items of one training, answered rightly or not."""
    rows = {"task": task, "id": [f"i{i}" for i in range(len(right))], "tokens": 2, "nll": 1.0}
    return pd.DataFrame({**rows, "correct": np.asarray(right, float)})


def seeded(*tables):
    return pd.concat([table.assign(seed=seed) for seed, table in enumerate(tables)])


def test_copies_of_one_training_tell_nothing_more():
    one, other = (results(RNG.random(200) < share) for share in (0.8, 0.7))
    (alone,) = compare_items(one, other)
    (found,) = compare_items(seeded(one, one, one), seeded(other, other, other))
    assert (found.n, found.seeds, alone.seeds) == (200, 3, 1)
    assert (found.wins, found.losses, found.ties) == (alone.wins, alone.losses, alone.ties)
    assert (found.difference, found.low, found.high) == pytest.approx(
        (alone.difference, alone.low, alone.high)
    )


def test_seeds_that_differ_widen_the_interval():
    other = results(np.arange(100) % 10 < 5)
    tables = [results(np.arange(100) % 10 < top) for top in (5, 7, 9)]
    (found,) = compare_items(seeded(*tables), seeded(other, other, other))
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.05
    assert (found.wins, found.losses, found.ties) == (40, 0, 60)  # in the mean over the seeds


def test_seeds_and_items_that_only_one_has_do_not_count():
    a, b = results([1, 0, 1, 1]), results([0, 0, 1, 1])
    first = seeded(a, a.iloc[:3], a)  # the last item lacks the second seed
    (found,) = compare_items(first, seeded(b, b))
    assert (found.n, found.seeds, found.wins) == (3, 2, 1)
    unknown = seeded(b, b.assign(correct=[np.nan, 0, 1, 1]))
    (found,) = compare_items(first, unknown)
    assert (found.n, found.seeds, found.wins) == (2, 2, 0)


def test_tasks_that_share_ids_stay_apart():
    one = pd.concat([results([1, 1, 0]), results([0, 1], "u")])
    other = pd.concat([results([0, 1, 0]), results([1, 1], "u")])
    found = {line.task: line for line in compare_items(seeded(one, one), seeded(other, other))}
    assert {task: line.n for task, line in found.items()} == {"all": 5, "t": 3, "u": 2}
    assert found["all"].difference == 0
    assert found["u"].losses == 1


@pytest.mark.parametrize("several_first", [True, False])
def test_seeds_on_one_side_are_refused(several_first):
    one = results([1, 0])
    pair = (seeded(one, one), one) if several_first else (one, seeded(one, one))
    several, single = ("first", "second") if several_first else ("second", "first")
    with pytest.raises(ConfigError, match=f"{several} has 2, {single} does not name any; run both"):
        compare_items(*pair)


def test_seeds_that_are_none_of_the_others_are_refused():
    one = results([1, 0])
    with pytest.raises(DataError, match=r"first has \[0\] and second has \[5\]"):
        compare_items(one.assign(seed=0), one.assign(seed=5))


def test_two_items_are_no_certain_difference():
    (found,) = compare_items(results([1, 1]), results([0, 0]))
    assert found.difference == found.high == 1
    assert found.low < 0
