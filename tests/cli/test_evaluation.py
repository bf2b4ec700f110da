"""``tclora eval`` and ``compare``: what they refuse, what they print and leave behind."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from tclora.errors import TcloraError
from tclora.model.base import Base
from tclora_cli.evaluating import measuring_code
from tclora_cli.main import app
from tests.evaluate.conftest import *  # noqa: F403

OPTIONS = ["--max-new-tokens", "3", "--token-budget", "400"]


def invoke(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def evaluated(trained, task_files, tmp_path):
    arguments = ["eval", trained, *OPTIONS, "-o", tmp_path / "found"]
    for file in task_files.values():
        arguments += ["--tasks", file]
    return arguments


def test_one_command_gives_one_table_in_every_format(evaluated, tmp_path):
    result = invoke(*evaluated)
    assert result.exit_code == 0
    for word in ("in-domain", "out of domain", "oracle", "colours", "Recovery", "["):
        assert word in result.stdout
    folder = tmp_path / "found"
    items = pd.read_parquet(folder / "answers.parquet")
    figures = pd.read_parquet(folder / "figures.parquet")
    assert items.groupby("method").size().to_dict() == dict.fromkeys(
        ["base", "own", "joint", "uniform", "routed", "oracle"], 13
    )
    base = items[(items["method"] == "base") & (items["task"] == "colours")]
    (row,) = figures[(figures["method"] == "base") & (figures["group"] == "colours")].to_dict(
        "records"
    )
    assert row["n"] == len(base) == 4
    assert row["accuracy"] == base["correct"].mean()
    assert row["accuracy_norm"] == base["correct_norm"].mean()
    assert row["nll"] == pytest.approx(base["nll"].sum() / base["tokens"].sum())
    cell = f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
    assert f"| out of domain | colours | 4 | {cell} |" in (folder / "tables.md").read_text()
    assert r"\begin{tabular}" in (folder / "tables.tex").read_text()
    assert "<table" in (folder / "tables.html").read_text()
    assert pd.read_csv(folder / "figures.csv").shape == figures.shape
    again = invoke(*evaluated)
    assert again.stdout.count("kept") == 12


def test_methods_tasks_and_mlflow_are_chosen(evaluated, tmp_path):
    chosen = ["--methods", "base", "--methods", "other", "--limit", "2", "--track"]
    other = evaluated[1] / "merged" / "uniform"
    result = invoke(*evaluated, *chosen, "--adapter", f"other={other}")
    items = pd.read_parquet(tmp_path / "found" / "answers.parquet")
    counts = items[items["task"] == "colours"].groupby("method").size().to_dict()
    assert counts == {"base": 2, "other": 2}
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("MLflow run"))
    run_id, uri = line.removeprefix("MLflow run").split(" in ")
    run = MlflowClient(uri.strip()).get_run(run_id.strip())
    assert run.info.status == "FINISHED"
    figures = pd.read_parquet(tmp_path / "found" / "figures.parquet")
    (row,) = figures[(figures["method"] == "base") & (figures["group"] == "colours")].to_dict(
        "records"
    )
    assert run.data.metrics["base/ood/task-colours/accuracy"] == row["accuracy"]
    assert "tables.md" in {f.path for f in MlflowClient(uri.strip()).list_artifacts(run_id.strip())}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "none.jsonl"], "task file 'none.jsonl' does not exist"),
        (["--tasks", "FILE", "--methods", "unifrom"], "did you mean uniform"),
        (["--tasks", "FILE", "--scorer", "colours"], "--scorer must be NAME=VALUE"),
        (["--tasks", "FILE", "--scorer", "colour=f1"], "did you mean colours"),
        (["--tasks", "FILE", "--limit", "0"], "--limit must be a number above 0 or TASK=NUMBER"),
        (["--tasks", "FILE", "--few-shot", "3"], "at most the training rows of task 'colours'"),
        (["--tasks", "FILE", "--adapter", "base=x"], "--adapter must have a name of its own"),
        (["--tasks", "FILE", "--adapter", "x=none"], "adapter_config.json"),
        (["--tasks", "FILE", "--template", "chatty"], "--template must be one of"),
        (["--tasks", "FILE", "--dtype", "float"], "--dtype must be one of"),
        (["--tasks", "FILE", "--tasks", "arc_eazy"], "or one of lm-eval's, got 'arc_eazy'"),
        (["--tasks", "ARC", "--tasks", "arc_easy"], "got 'arc_easy' from the file 'arc_easy' and"),
        (
            ["--tasks", "ARC", "--tasks", "ai2_arc"],
            "file 'arc_easy' and from lm-eval's 'ai2_arc'",
        ),
        (["--tasks", "ai2_arc", "--tasks", "arc_easy"], "from lm-eval's 'ai2_arc' and from lm-eva"),
        (["--tasks", "humaneval"], "humaneval runs code written by the model; give --allow-code"),
    ],
)
def test_a_bad_input_is_said_before_a_model_is_loaded(
    trained, task_files, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(Base, "load", None)
    same = shutil.copy(task_files["colours"], tmp_path / "arc_easy.jsonl")
    files = {"FILE": str(task_files["colours"]), "ARC": str(same)}
    given = [files.get(argument, argument) for argument in arguments]
    with pytest.raises(TcloraError) as caught:
        invoke("eval", trained, "-o", tmp_path / "found", *given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "more.jsonl"], "--shots cannot be used with lm-eval's task 'CHOICES', which"),
        (["--template", "chat"], "--template chat cannot be used with lm-eval's task 'CHOICES'"),
        (["--few-shot", "2"], "--few-shot cannot be used with lm-eval's task 'CHOICES', which"),
        (["--no-generate"], "--no-generate cannot be used with lm-eval's task 'TEXTS', which"),
        (["--max-new-tokens", "3"], "--max-new-tokens cannot be used with lm-eval's task 'TEXTS'"),
        (["--methods", "own"], "--methods own must have a file of rows in --tasks, got lm-eval's"),
        (["--limit", "mine=2"], "--limit must name a task, got 'mine'; known: CHOICES, TEXTS"),
        (["--scorer", "CHOICES=f1"], "--scorer must name a task of rows, got 'CHOICES'; known: "),
    ],
)
def test_what_lm_evals_tasks_cannot_follow_is_said(
    trained, yaml_tasks, tmp_path, monkeypatch, arguments, message
):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(Base, "load", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"prompt": "p", "response": "r"}\n')

    def named(text):
        for word, file in zip(("CHOICES", "TEXTS"), yaml_tasks, strict=True):
            text = text.replace(word, file)
        return text

    tasks = [part for file in yaml_tasks for part in ("--tasks", file)]
    with pytest.raises(TcloraError) as caught:
        invoke("eval", trained, "-o", tmp_path / "found", *tasks, *map(named, arguments))
    assert named(message) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_texts_are_no_matter_to_choices(trained, yaml_tasks, tmp_path):
    pytest.importorskip("lm_eval")
    file = yaml_tasks[0]
    options = ["--no-generate", "--methods", "base", "--limit", f"{file}=2", *OPTIONS]
    invoke("eval", trained, "-o", tmp_path / "found", "--tasks", file, *options)
    items = pd.read_parquet(tmp_path / "found" / "answers.parquet")
    assert items["task"].tolist() == ["mine_choices"] * 2


def test_code_that_places_and_routes_prompts_is_code_that_results_depend_on():
    names = {f"{found.module}.{found.name}" for found in measuring_code().definitions}
    assert names >= {
        "tclora.evaluate.places.Places.routed",
        "tclora.evaluate.places.Places.oracle",
        "tclora.evaluate.places.Places.nearest",
        "tclora.cluster.embed.embed_texts",
        "tclora.cluster.centroids.assign",
        "tclora.route.quality.true_clusters",
        "tclora.route.routers.nearest.Nearest.route",
        "tclora.route.routers.per_token.PerToken.route",
    }


def test_a_bad_target_ends_with_code_two(task_files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tclora_cli", "eval", "no/such", "--tasks", task_files["colours"]],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},  # noqa: PTH109
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: model 'no/such' must be")


def test_compare_pairs_two_results_item_by_item(tmp_path):
    rows = [
        {"method": method, "task": task, "id": f"{i}", "tokens": 2, "nll": nll, "correct": right,
         "correct_norm": float("nan")}
        for method, task, i, nll, right in [
            ("a", "t", 0, 2.0, 1.0), ("a", "t", 1, 4.0, 1.0), ("a", "u", 0, 6.0, 0.0),
            ("b", "t", 0, 3.0, 0.0), ("b", "t", 1, 4.0, 1.0), ("b", "u", 0, 1.0, 1.0),
        ]
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "answers.parquet")
    pair = (f"{tmp_path}:a", f"{tmp_path}:b")
    result = invoke("compare", *pair)
    line = next(row for row in result.stdout.splitlines() if row.strip().startswith("all"))
    assert line.split()[:6] == ["all", "3", "1", "0.6667", "0.6667", "+0.0000"]
    assert line.split()[-3:] == ["1", "1", "1"]
    result = invoke("compare", *pair, "--metric", "nll", "--tasks", "t")
    line = next(row for row in result.stdout.splitlines() if row.strip().startswith("all"))
    assert line.split()[:6] == ["all", "2", "1", "1.5000", "1.7500", "-0.2500"]
    assert line.split()[-3:] == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        ("nowhere:a", [], "must be a folder of `tclora eval` or a library"),
        ("FOUND", [], "a result must be FOLDER:METHOD"),
        ("FOUND:c", [], "got 'c'; a"),
        ("FOUND:a", ["--tasks", "x"], "--tasks must be tasks of the result"),
        ("FOUND:a", ["--metric", "bleu"], "--metric must be one of"),
        ("FOUND:a", ["--metric", "correct_norm"], "must share items with 'correct_norm'"),
    ],
)
def test_compare_says_what_is_wrong(tmp_path, first, options, message):
    row = {"method": "a", "task": "t", "id": "1", "tokens": 2, "nll": 1.0, "correct": 1.0,
           "correct_norm": float("nan")}  # fmt: skip
    pd.DataFrame([row]).to_parquet(tmp_path / "answers.parquet")
    given = first.replace("FOUND", str(tmp_path))
    with pytest.raises(TcloraError) as caught:
        invoke("compare", given, f"{tmp_path}:a", *options)
    assert message in str(caught.value)


def test_a_librarys_own_evaluation_can_be_compared(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    rows = [{"method": m, "task": "t", "id": "1", "tokens": 2, "nll": n, "correct": 1.0,
             "correct_norm": 1.0} for m, n in (("a", 1.0), ("b", 2.0))]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "items.parquet")
    result = invoke("compare", f"{tmp_path}:a", f"{tmp_path}:b", "--metric", "nll")
    assert json.dumps("-0.5000")[1:-1] in result.stdout
