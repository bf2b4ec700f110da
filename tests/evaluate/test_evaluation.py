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
from tclora.errors import ConfigError, ModelError
from tclora.evaluate.evaluation import Plan, Results, evaluate_target
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.targets import BaseChoice, open_target
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.route import read_library
from tests.data.rows import save_rows

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


def test_rows_that_name_several_skills_are_compositions(target, results, tmp_path):
    rows = [{"prompt": f"Add {i} and 1 backwards.", "response": "1", "task": "both",
             "skills": ["sums", "reversal"]} for i in range(3)]  # fmt: skip
    rows.append({"prompt": "Add 3 and 4.", "response": "7", "task": "sums", "skills": "sums"})
    tasks = read_tasks([save_rows(tmp_path / "rows.jsonl", rows)], TaskSettings())
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
