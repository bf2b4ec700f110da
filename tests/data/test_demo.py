import hashlib
import os
import subprocess
import sys

import pytest

from tclora.data.demo import FAMILIES, demo_examples
from tclora.errors import DataError
from tclora.evaluate.scorers import Expected, score

DIGEST = (
    "import hashlib; from tclora.data.demo import demo_examples; "
    "print(hashlib.sha256(demo_examples(8, 4, seed=3).to_csv().encode()).hexdigest())"
)
SEED_0 = "33c83552e32d89a5b157f0bb7494543fc18c7463a447b7c2ec6c0626a4a28106"


@pytest.fixture(scope="module")
def rows():
    return demo_examples(30, 10, seed=0)


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_the_same_rows_in_every_process(hash_seed):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = demo_examples(8, 4, seed=3).to_csv()
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_the_seed_matters():
    assert set(demo_examples(8, 4, seed=1)["prompt"]) != set(demo_examples(8, 4, seed=2)["prompt"])


def test_seeds_give_other_rows():
    one, two = (demo_examples(60, 20, seed=seed)["prompt"] for seed in (0, 1))
    assert two.isin(one).mean() < 0.1


def test_the_rows_of_seed_0_stay():
    rows = demo_examples(8, 4, seed=0)
    kept = rows.loc[rows["split"] != "composition", ["prompt", "response", "split"]].to_csv()
    assert hashlib.sha256(kept.encode()).hexdigest() == SEED_0


def test_compositions_are_not_made_of_trained_lists():
    rows = demo_examples(seed=0)
    lists = rows["prompt"].str.extract(r"(\[.*?\])")[0]
    trained = set(lists[rows["task"] == "filtering"])
    assert len(trained) > 200
    assert not trained & set(lists[rows["task"] == "filter_by_sum"])


def test_no_prompt_appears_twice(rows):
    assert rows["prompt"].is_unique


def test_sizes_and_splits(rows):
    kinds = [family.split for family in FAMILIES]
    assert kinds.count("train") >= 6
    assert kinds.count("ood") == 2
    assert kinds.count("composition") == 1
    for family in FAMILIES:
        part = rows.loc[rows["task"] == family.task, "split"].value_counts().to_dict()
        wanted = {"train": 30, "test": 10} if family.split == "train" else {family.split: 10}
        assert part == wanted


def test_rows_are_shuffled(rows):
    assert rows["task"].iloc[:20].nunique() > 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.task)
def test_right_answers_score_one_and_junk_nothing(rows, family):
    for row in rows[rows["task"] == family.task].itertuples():
        answer, expected = row.response, Expected(row.response, metadata=row.metadata)
        assert score(row.scorer, answer, expected) == 1
        assert score(row.scorer, f" {answer}\n", expected) == 1
        for junk in ("", "junk", "no idea at all", "-987654321"):
            assert score(row.scorer, junk, expected) == 0, (junk, row)


def test_the_composition_asks_for_a_sum_of_the_same_value(rows):
    for row in rows[rows["task"] == "filter_by_sum"].itertuples():
        numbers = row.prompt.split("than ")[1].split(" in")[0].split()
        assert numbers[1] in {"+", "-"}
        first, second = int(numbers[0]), int(numbers[2])
        threshold = first + second if numbers[1] == "+" else first - second
        listed = [float(n.strip("'")) for n in row.prompt.split("[")[1].split("]")[0].split(", ")]
        kept = [float(n.strip("'")) for n in row.response.strip("[]").split(", ") if n]
        larger, keep = "larger" in row.prompt, "Keep" in row.prompt
        wanted = [n for n in listed if ((n > threshold) if larger else (n < threshold)) == keep]
        assert kept == wanted, row.prompt


def test_too_many_rows_for_a_family_is_an_error():
    with pytest.raises(DataError, match=r"has only .* different prompts, .* asked for"):
        demo_examples(15_000, 10)
