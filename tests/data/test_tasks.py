"""Rows to measure on: which are shown before them, limits, scorers, and what is refused."""

import pytest

from tclora.data.tasks import TaskSettings, read_tasks
from tclora.errors import ConfigError, DataError
from tests.data.rows import save_rows


def test_rows_to_show_are_training_rows_of_the_task(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "task": "a" if i < 6 else "b",
             "split": "train" if i % 2 else "test"} for i in range(12)]  # fmt: skip
    file = save_rows(tmp_path / "rows.jsonl", rows)
    found = read_tasks([file], TaskSettings(few_shot=2, seed=3))["rows"]
    assert found["prompt"].tolist() == ["p0", "p2", "p4", "p6", "p8", "p10"]
    for task, shots in zip(found["task"], found["shots"], strict=True):
        assert {prompt for prompt, _ in shots} <= set(
            ["p1", "p3", "p5"] if task == "a" else ["p7", "p9", "p11"]
        )
        assert all(response == prompt.replace("p", "r") for prompt, response in shots)
    again = read_tasks([file], TaskSettings(few_shot=2, seed=3))["rows"]
    assert again["shots"].tolist() == found["shots"].tolist()
    with pytest.raises(ConfigError, match=r"at most the training rows of task 'a' \(3\), got 4"):
        read_tasks([file], TaskSettings(few_shot=4))


def test_rows_to_show_may_come_from_a_file_and_are_never_measured(tmp_path):
    asked = save_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    shown = save_rows(tmp_path / "shown.jsonl", [
        {"prompt": "p", "response": "r", "task": "a"}, {"prompt": "q", "response": "s", "task": "a"}
    ])  # fmt: skip
    (row,) = read_tasks([asked], TaskSettings(few_shot=1, shown_from=[shown]))["a"]["shots"]
    assert row == [["q", "s"]]


def test_the_limit_takes_the_first_rows_and_scorers_go_by_task(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "x", "task": "ab"[i % 2]} for i in range(6)]
    file = save_rows(tmp_path / "rows.jsonl", rows)
    settings = TaskSettings(limits={"": 2, "b": 1}, scorers={"b": "f1"})
    found = read_tasks([file], settings)["rows"]
    assert found["prompt"].tolist() == ["p0", "p1", "p2"]
    assert found["scorer"].tolist() == ["exact", "f1", "exact"]
    assert len(read_tasks([file], TaskSettings())["rows"]) == 6


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            TaskSettings(scorers={"c": "f1"}),
            ConfigError,
            "--scorer must name a task of rows, got 'c'",
        ),
        (TaskSettings(scorers={"a": "letter"}), ConfigError, "--scorer of task a: .*letter"),
        (
            TaskSettings(scorers={"a": "chrff"}),
            ConfigError,
            "--scorer of task a: .*did you mean chrf",
        ),
        (TaskSettings(limits={"c": 2}), ConfigError, "--limit must name a task, got 'c'"),
        (TaskSettings(shown_from=["none.jsonl"]), DataError, "'none.jsonl' does not exist"),
    ],
)
def test_bad_settings_are_said(tmp_path, settings, error, message):
    file = save_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(error, match=message):
        read_tasks([file], settings)


def test_files_of_one_name_and_files_of_training_rows_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    one = save_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    two = save_rows(tmp_path / "x" / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(DataError, match="two files 'a'"):
        read_tasks([one, two], TaskSettings())
    save_rows(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "split": "train"}])
    with pytest.raises(DataError, match="'a' must have rows to measure"):
        read_tasks([one], TaskSettings())
