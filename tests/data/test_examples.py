import json

import pandas as pd
import pytest

from tclora.config import DataConfig
from tclora.data import examples as reading
from tclora.data.examples import ExampleSet, profile, read_examples
from tclora.errors import DataError
from tests.data.rows import save_rows


@pytest.fixture
def rows():
    """Forty prompts, each asked twice with different responses, of four tasks."""
    return [
        {"prompt": f"question {i % 40}", "response": f"answer {i}", "task": f"t{i % 4}"}
        for i in range(80)
    ]


@pytest.fixture
def path(tmp_path, rows):
    return save_rows(tmp_path / "rows.jsonl", rows)


def prompts(frame, split):
    return set(frame.loc[frame["split"] == split, "prompt"])


def test_split_is_by_prompt_and_nothing_is_lost(path):
    frame = read_examples(DataConfig(path=path, test_fraction=0.25)).frame
    assert len(frame) == 80
    assert frame["id"].is_unique
    assert len(prompts(frame, "test")) == 10
    assert not prompts(frame, "test") & prompts(frame, "train")


def test_the_split_follows_the_seed(path):
    config = DataConfig(path=path, test_fraction=0.25)
    first, again = read_examples(config, seed=1).frame, read_examples(config, seed=1).frame
    pd.testing.assert_frame_equal(first, again)
    assert prompts(first, "test") != prompts(read_examples(config, seed=2).frame, "test")


def test_no_test_rows_where_the_fraction_is_zero(path):
    frame = read_examples(DataConfig(path=path, test_fraction=0)).frame
    assert set(frame["split"]) == {"train"}


@pytest.mark.parametrize("fraction", [0.01, 0.99, 1.0])
def test_two_prompts_leave_one_on_each_side(tmp_path, fraction):
    path = save_rows(tmp_path / "two.jsonl", [{"prompt": p, "response": "r"} for p in "ab"])
    frame = read_examples(DataConfig(path=path, test_fraction=fraction)).frame
    assert sorted(frame["split"]) == ["test", "train"]


def test_given_splits_are_kept_and_win_over_the_fraction(tmp_path, rows):
    for i, row in enumerate(rows):
        row["prompt"] += f" {i}"
        row["split"] = "test" if i < 5 else "composition" if i < 8 else "train"
    path = save_rows(tmp_path / "split.jsonl", rows)
    frame = read_examples(DataConfig(path=path, test_fraction=0.5)).frame
    assert frame["split"].value_counts().to_dict() == {"train": 72, "test": 5, "composition": 3}


def test_training_rows_asked_in_an_evaluation_file_are_left_out(tmp_path, path):
    test = save_rows(tmp_path / "test.jsonl", [{"prompt": "question 3", "response": "x"}])
    ood = save_rows(tmp_path / "ood.jsonl", [{"prompt": "question 4", "response": "x"}])
    both = save_rows(tmp_path / "both.jsonl", [{"prompt": "two skills", "response": "x"}])
    frame = read_examples(
        DataConfig(path=path, test_path=test, ood_path=ood, composition_path=both)
    ).frame
    assert prompts(frame, "test") == {"question 3"}
    assert prompts(frame, "ood") == {"question 4"}
    assert prompts(frame, "composition") == {"two skills"}
    assert len(frame[frame["split"] == "train"]) == 76
    assert not prompts(frame, "train") & {"question 3", "question 4"}


def test_held_out_tasks_are_never_trained_on(path):
    frame = read_examples(DataConfig(path=path, ood_tasks=("t1", "t2"))).frame
    assert set(frame.loc[frame["split"] == "ood", "task"]) == {"t1", "t2"}
    assert set(frame.loc[frame["split"] != "ood", "task"]) == {"t0", "t3"}
    assert (frame["split"] == "ood").sum() == 40


def test_an_unknown_held_out_task_is_named_with_the_known_ones(path):
    with pytest.raises(DataError, match=r"\['t9'\] must be task labels .*'t0', 't1'"):
        read_examples(DataConfig(path=path, ood_tasks=("t1", "t9")))


def test_holding_everything_out_leaves_nothing_to_train_on(path):
    with pytest.raises(DataError, match="no training row is left"):
        read_examples(DataConfig(path=path, ood_tasks=("t0", "t1", "t2", "t3")))


def test_samples_have_the_size_asked_for(path):
    config = DataConfig(path=path, test_fraction=0.5, max_train_rows=7, max_test_rows=5)
    frame = read_examples(config).frame
    assert frame["split"].value_counts().to_dict() == {"train": 7, "test": 5}
    pd.testing.assert_frame_equal(frame, read_examples(config).frame)
    assert set(frame["id"]) != set(read_examples(config, seed=1).frame["id"])


def test_lines_that_hold_no_row_are_skipped_or_all_told(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    lines = path_lines(rows)
    path.write_text("".join([*lines[:3], "{broken\n", *lines[3:40], "[1]\n", *lines[40:]]))
    examples = read_examples(DataConfig(path=str(path), on_bad_row="skip"))
    assert len(examples.frame) == len(rows)
    assert [line.partition(": ")[0] for line in examples.skipped] == [
        f"{path}, line 4", f"{path}, line 42"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)2 bad row.*line 4: is not valid JSON.*line 42"):
        read_examples(DataConfig(path=str(path)))


def path_lines(rows):
    return [json.dumps(row) + "\n" for row in rows]


def test_skipped_rows_of_every_file_are_listed(tmp_path, rows):
    path = save_rows(tmp_path / "a.jsonl", [*rows, {"prompt": "x", "response": ""}])
    test = save_rows(
        tmp_path / "b.jsonl", [{"prompt": "", "response": "y"}, {"prompt": "z", "response": "z"}]
    )
    examples = read_examples(DataConfig(path=path, test_path=test, on_bad_row="skip"))
    assert len(examples.skipped) == 2
    assert "a.jsonl, row 81" in examples.skipped[0]
    assert "b.jsonl, row 1" in examples.skipped[1]
    with pytest.raises(DataError, match="row 81"):
        read_examples(DataConfig(path=path))


def test_profile_counts_what_it_says():
    frame = pd.DataFrame(
        {
            "prompt": ["a b", "a b", "c d e f"],
            "response": ["x", "y z", "u v w"],
            "task": ["s", "s", None],
            "split": ["train", "train", "test"],
        }
    )
    figures = profile(
        ExampleSet(frame, ("row 4",)), lambda texts: [len(t.split()) for t in texts], 4
    )
    assert figures == {
        "rows_train": 2.0, "rows_test": 1.0, "rows": 3.0, "tasks": 1.0, "skipped_rows": 1.0,
        "repeated_prompts": 1.0, "prompt_tokens_mean": 8 / 3, "prompt_tokens_max": 4.0,
        "response_tokens_mean": 2.0, "response_tokens_max": 3.0, "truncated_rows": 1.0,
    }  # fmt: skip


def test_the_demo_has_every_split():
    frame = read_examples(DataConfig(demo_train_rows=6, demo_test_rows=3)).frame
    counts = frame["split"].value_counts().to_dict()
    assert counts == {"train": 36, "test": 18, "ood": 6, "composition": 3}


def test_a_source_is_sampled_while_it_is_read(path):
    config = DataConfig(path=path, max_read_rows=30, test_fraction=0.2)
    frame = read_examples(config, seed=1).frame
    assert len(frame) == 30
    pd.testing.assert_frame_equal(frame, read_examples(config, seed=1).frame)
    assert set(frame["id"]) != set(read_examples(config, seed=2).frame["id"])


def test_only_a_sampled_dataset_of_the_hub_is_streamed(path, monkeypatch):
    asked = []

    def read_blocks(*_, stream):
        asked.append(stream)
        yield pd.DataFrame({"source": ["a", "b"], "target": ["c", "d"]}, index=[1, 2])

    monkeypatch.setattr(reading, "read_blocks", read_blocks)
    for limit in (None, 2):
        read_examples(DataConfig(path="someone/flan", max_read_rows=limit, test_fraction=0))
    assert asked == [False, True]


def test_the_datas_own_seed_wins_over_the_runs(path):
    config = DataConfig(path=path, test_fraction=0.5, seed=4)
    frames = [read_examples(config, seed=seed).frame for seed in (0, 1)]
    pd.testing.assert_frame_equal(*frames)
    pd.testing.assert_frame_equal(
        frames[0], read_examples(config.model_copy(update={"seed": None}), seed=4).frame
    )


def test_tokens_of_many_rows_are_counted_on_a_sample(path, monkeypatch):
    examples = read_examples(DataConfig(path=path, test_fraction=0))

    def count(texts):
        return [len(text) for text in texts]

    whole = profile(examples, count, 10)
    assert "token_sample_rows" not in whole
    monkeypatch.setattr(reading, "_COUNTED", 20)
    sampled = profile(examples, count, 10)
    assert sampled["token_sample_rows"] == 20
    assert sampled["rows"] == whole["rows"]
    assert sampled["prompt_tokens_mean"] == pytest.approx(whole["prompt_tokens_mean"], rel=0.2)
    assert sampled["truncated_rows"] == pytest.approx(whole["truncated_rows"], abs=0.2 * len(
        examples.frame
    ))  # fmt: skip
    assert profile(examples, count, 10) == sampled


def test_tokens_are_counted_some_texts_at_a_time(path, monkeypatch):
    examples = read_examples(DataConfig(path=path, test_fraction=0))
    sizes = []

    def count(texts):
        sizes.append(len(texts))
        return [len(text) for text in texts]

    whole = profile(examples, count, 10)
    monkeypatch.setattr(reading, "_TOKENISED", 7)
    assert profile(examples, count, 10) == whole
    assert max(sizes[2:]) == 7
