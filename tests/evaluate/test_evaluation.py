import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pandas as pd
import pytest

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.data.tasks import TaskSettings, read_tasks
from tclora.errors import ConfigError, DataError, ModelError
from tclora.evaluate.evaluation import Plan, Results, evaluate_target
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.targets import BaseChoice, open_target
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.route import read_library

CONFIG = MeasureConfig(max_new_tokens=3, token_budget=400)


def plan_of(target, tasks, methods=(), **changes):
    values = {"lm_eval": LmEvalConfig(), "config": CONFIG, "code": "here"} | changes
    return Plan(target.choose(methods), tasks, **values)


@pytest.fixture
def target(trained, tmp_path):
    return open_target(str(trained), tmp_path / "results" / "prompts")


@pytest.fixture
def tasks(task_files):
    return read_tasks([str(file) for file in task_files.values()], TaskSettings())


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def frame_options(target):
    return {"template": "plain", "max_tokens": target.base.max_tokens, "token_budget": 400,
            "max_new_tokens": 3}  # fmt: skip


def test_every_method_answers_as_its_adapters_alone(
    target, tasks, results, tiny_model, tokenizer, adapters
):
    items = evaluate_target(target, plan_of(target, tasks), results)
    assert list(target.methods) == ["base", "own", "joint", "uniform", "routed", "oracle"]
    assert items.groupby("method").size().to_dict() == dict.fromkeys(target.methods, 13)
    frame = pd.concat(tasks.values(), ignore_index=True)
    wanted = {}
    for name, adapter in [("base", None), *((a.name, a) for a in adapters)]:
        with attached(tiny_model, adapter) if adapter else nullcontext():
            found = evaluate_frame(tiny_model, tokenizer, frame, **frame_options(target))
        wanted[name] = found.set_index("id")

    def same(method, cluster_of):
        mine = items[items["method"] == method]
        for row in mine.to_dict("records"):
            reference = wanted[cluster_of(row)].loc[row["id"]]
            assert row["nll"] == pytest.approx(reference["nll"], rel=2e-4)
            assert row["correct"] == reference["correct"]

    same("base", lambda _: "base")
    same("joint", lambda _: "cluster-1")
    same("own", lambda row: f"cluster-{row['cluster']}")
    own = items[items["method"] == "own"].set_index("id")
    oracle = items[items["method"] == "oracle"].set_index("id")
    true = {"sums": 0, "reversal": 1, "logic": 2}
    gated = [
        i for i in own.index if own["cluster"][i] == true.get(own["task"][i], own["cluster"][i])
    ]
    assert len(gated) > 6  # the joint CP has room for every adapter: its gates are the adapters
    assert oracle["nll"][gated].tolist() == pytest.approx(own["nll"][gated].tolist(), rel=1e-3)


def test_the_splits_are_the_librarys(target, tasks, results):
    items = evaluate_target(target, plan_of(target, tasks, ["base", "own"]), results)
    known = items.groupby("task")["split"].first().to_dict()
    assert known == {"sums": "test", "reversal": "test", "logic": "test", "colours": "ood"}
    assert items["cluster"].isin([0, 1, 2]).all()


def test_the_oracle_asks_the_task_and_else_the_nearest_cluster(target):
    rows = pd.DataFrame({"prompt": ["Add 3 and 4."] * 2, "task": ["logic", "unknown"]})
    routing = target.places.oracle(rows)
    assert routing.weights.argmax(axis=1).tolist() == [2, 0]
    assert routing.known.all()


def test_what_was_measured_is_not_measured_again(target, tasks, results, monkeypatch):
    methods = ["base", "uniform", "routed"]
    first = evaluate_target(target, plan_of(target, tasks, methods), results)
    monkeypatch.setattr(Base, "load", None)  # nothing to load a model for
    events = []
    again = evaluate_target(target, plan_of(target, tasks, methods), results, events.append)
    pd.testing.assert_frame_equal(first, again)
    assert [event["kept"] for event in events] == [True] * 6


@pytest.mark.parametrize(
    "change",
    [
        {"config": CONFIG.model_copy(update={"max_new_tokens": 2})},
        {"config": CONFIG.model_copy(update={"generate": False})},
        {"code": "elsewhere"},
    ],
)
def test_other_settings_or_code_are_measured_anew(target, tasks, results, change):
    one = {"known": tasks["known"]}
    evaluate_target(target, plan_of(target, one, ["base"]), results)
    events = []
    evaluate_target(target, plan_of(target, one, ["base"], **change), results, events.append)
    assert not any("kept" in event for event in events)


def test_a_larger_batch_is_no_other_result(target, tasks, results):
    evaluate_target(target, plan_of(target, tasks, ["base"]), results)
    events = []
    wider = CONFIG.model_copy(update={"token_budget": 999})
    evaluate_target(target, plan_of(target, tasks, ["base"], config=wider), results, events.append)
    assert all(event["kept"] for event in events)


def test_a_file_with_the_name_of_one_of_lm_evals_tasks_is_refused(target, tasks, results):
    plan = plan_of(target, tasks, ["base"], lm_eval=LmEvalConfig(lm_eval=("colours",)))
    message = "got a file of rows 'colours' and lm-eval's task 'colours'; rename the file"
    with pytest.raises(ConfigError, match=message):
        evaluate_target(target, plan, results)
    assert not results.root.exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tclora.config import LmEvalConfig, MeasureConfig
    from tclora.data.tasks import TaskSettings, read_tasks
    from tclora.evaluate.evaluation import Plan, Results, evaluate_target
    from tclora.evaluate.targets import BaseChoice, open_target

    library, root, *files = sys.argv[1:]
    target = open_target(library, Path(root) / "prompts")
    seen = []

    def die(event):
        seen.append(event)
        if event["method"] == "joint":  # in the middle of its first task
            os.kill(os.getpid(), signal.SIGKILL)

    plan = Plan(target.choose(["base", "joint"]), read_tasks(files, TaskSettings()),
                LmEvalConfig(), MeasureConfig(max_new_tokens=3, token_budget=400), "here")
    evaluate_target(target, plan, Results(Path(root)), die)
"""


def test_a_killed_evaluation_goes_on(target, trained, tasks, task_files, results):
    files = [str(file) for file in task_files.values()]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(trained), str(results.root)]
    done = subprocess.run([*command, *files], env=os.environ | {"PYTHONPATH": os.getcwd()})  # noqa: PTH109
    assert done.returncode == -signal.SIGKILL
    events = []
    plan = plan_of(target, tasks, ["base", "joint"])
    items = evaluate_target(target, plan, results, events.append)
    kept = [(event["method"], event["task"]) for event in events if event.get("kept")]
    measured = {(event["method"], event["task"]) for event in events if not event.get("kept")}
    assert sorted(kept) == [("base", "colours"), ("base", "known")]
    assert measured == {("joint", "colours"), ("joint", "known")}
    assert items.groupby("method").size().to_dict() == {"base": 13, "joint": 13}


def test_an_adapter_and_a_base_model_are_targets_too(trained, tiny_model_dir, tasks, results):
    one = {"colours": tasks["colours"]}
    choice = BaseChoice(str(tiny_model_dir), "plain", "float32")
    adapter = open_target(str(trained / "adapters" / "cluster-2"), results.embeddings, choice)
    items = evaluate_target(adapter, plan_of(adapter, one), results)
    assert items["method"].unique().tolist() == ["base", "cluster-2"]
    model = open_target(str(tiny_model_dir), results.embeddings)
    assert model.base.template == "chat"  # its tokenizer has one
    items = evaluate_target(model, plan_of(model, one), results)
    assert items["method"].unique().tolist() == ["base"]
    assert items["split"].unique().tolist() == ["ood"]  # nobody knows of a task trained on
    said = {"colours": one["colours"].assign(split="test")}
    items = evaluate_target(model, plan_of(model, said), results)
    assert items["split"].unique().tolist() == ["test"]


def test_another_base_model_is_refused(trained, tmp_path, tiny_model_dir):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    (other / "note").write_text("changed")
    with pytest.raises(ModelError, match="must be the library's own"):
        open_target(str(trained), tmp_path, BaseChoice(str(other)))


def test_an_unknown_method_is_refused(target):
    with pytest.raises(ConfigError, match="--methods must be of 'small', got 'unifrom'; did you"):
        target.choose(["unifrom"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_to_show_are_training_rows_of_the_task(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "task": "a" if i < 6 else "b",
             "split": "train" if i % 2 else "test"} for i in range(12)]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
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
    asked = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    shown = write(tmp_path / "shown.jsonl", [
        {"prompt": "p", "response": "r", "task": "a"}, {"prompt": "q", "response": "s", "task": "a"}
    ])  # fmt: skip
    (row,) = read_tasks([asked], TaskSettings(few_shot=1, shown_from=[shown]))["a"]["shots"]
    assert row == [["q", "s"]]


def test_the_limit_takes_the_first_rows_and_scorers_go_by_task(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "x", "task": "ab"[i % 2]} for i in range(6)]
    file = write(tmp_path / "rows.jsonl", rows)
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
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(error, match=message):
        read_tasks([file], settings)


def test_files_of_one_name_and_files_of_training_rows_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    one = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    two = write(tmp_path / "x" / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(DataError, match="two files 'a'"):
        read_tasks([one, two], TaskSettings())
    write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "split": "train"}])
    with pytest.raises(DataError, match="'a' must have rows to measure"):
        read_tasks([one], TaskSettings())


def test_rows_that_name_several_skills_are_compositions(target, results, tmp_path):
    rows = [{"prompt": f"Add {i} and 1 backwards.", "response": "1", "task": "both",
             "skills": ["sums", "reversal"]} for i in range(3)]  # fmt: skip
    rows.append({"prompt": "Add 3 and 4.", "response": "7", "task": "sums", "skills": "sums"})
    tasks = read_tasks([write(tmp_path / "rows.jsonl", rows)], TaskSettings())
    items = evaluate_target(target, plan_of(target, tasks, ["base"]), results)
    assert items["split"].tolist() == ["composition"] * 3 + ["test"]
    assert items["skills"].tolist() == ["reversal+sums"] * 3 + ["sums"]


def test_the_routed_library_is_the_one_that_generates(target, tasks, results, trained):
    """Routing in an evaluation is that of `tclora.load`."""
    import tclora

    items = evaluate_target(target, plan_of(target, {"known": tasks["known"]}, ["routed"]), results)
    model = tclora.load(trained, dtype="float32")
    answers = model.generate(tasks["known"]["prompt"].tolist(), max_new_tokens=3)
    assert items["generated"].tolist() == [answer.text for answer in answers]
    assert read_library(trained).gated.names == model.library.gated.names
