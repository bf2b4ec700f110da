import platform
from pathlib import Path

import pandas as pd
import pytest
import yaml

import tclora
from tasks import tracking
from tasks.datasets import dataset_of
from tasks.logged_models import log_model_files, register_model
from tasks.tracking import Run
from tclora.config import parse_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return parse_config({"name": "trial", "output": str(tmp_path_factory.mktemp("runs"))})


@pytest.fixture(scope="module")
def run(config):
    return tracking.open_run(config, "first", {"prefect.flow_run_id": "f-1"})


def metrics_of(run: Run):
    return run.client.get_run(run.run_id).data.metrics


def test_a_store_is_made_in_the_output_folder(config, run):
    assert run.uri == f"sqlite:///{config.output}/mlflow.db"
    assert (config.output / "mlflow.db").is_file()
    found = run.client.get_run(run.run_id)
    assert found.info.run_name == "first"
    assert found.data.tags["prefect.flow_run_id"] == "f-1"
    assert found.data.params["train.lr"] == "0.0002"
    assert found.data.params["cluster.k_range"] == "[2, 12]"
    assert found.info.artifact_uri.startswith((config.output / "mlartifacts").as_uri())


def test_the_users_store_wins(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking.tracking_uri(config.output) == "http://127.0.0.1:9"


def test_a_second_run_joins_the_experiment(config, run):
    second = tracking.open_run(config, "second", {})
    assert second.experiment_id == run.experiment_id
    assert second.run_id != run.run_id
    tracking.close_run(second, "KILLED")
    assert run.client.get_run(second.run_id).info.status == "KILLED"


def test_runs_of_other_folders_and_machines_go_on(config, run, tmp_path, monkeypatch):
    """Another machine may have a folder of the same path, and the same store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    folder = tmp_path / "o'brien"
    other = parse_config({"name": "trial", "output": str(folder)})
    first = tracking.open_run(other, "first", {})
    (folder / ".place").unlink()  # as on another machine
    second = tracking.open_run(other, "second", {})
    third = tracking.open_run(other, "third", {})
    found = [run.client.get_run(r.run_id).info.status for r in (first, second, third)]
    assert found == ["RUNNING", "KILLED", "RUNNING"]


def test_metrics_that_are_undefined_or_oddly_named(run):
    nested = tracking.nested_run(run, "odd", {})
    tracking.log_metrics(nested, {"test/task-größe (%)/nll": 1, "nothing": float("nan")})
    assert metrics_of(nested) == {"test/task-größe ___/nll": 1.0}


def test_long_parameters_are_shortened(run):
    nested = tracking.nested_run(run, "params", {})
    tracking.log_params(nested, {f"p{i}": "x" * 10_000 for i in range(150)})
    params = run.client.get_run(nested.run_id).data.params
    assert len(params) == 150
    assert {len(value) for value in params.values()} == {6000}


def test_rows_are_recorded_by_digest(run):
    nested = tracking.nested_run(run, "rows", {})
    frame = pd.DataFrame({"prompt": ["a", "b"], "response": ["c", "d"], "choices": [None, ["x"]]})
    rows = dataset_of(frame, "mine.jsonl", "trial-train", "training")
    run.client.log_inputs(nested.run_id, datasets=[rows])
    (entry,) = run.client.get_run(nested.run_id).inputs.dataset_inputs
    assert entry.dataset.name == "trial-train"
    assert "mine.jsonl" in entry.dataset.source
    assert entry.tags[0].value == "training"
    changed = dataset_of(frame[:1], "mine.jsonl", "trial-train", "training")
    assert changed.dataset.digest != entry.dataset.digest


def test_an_adapter_is_stored_once_per_digest_and_registered(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    one = tracking.nested_run(run, "one", {})
    two = tracking.nested_run(run, "two", {})
    first = log_model_files(one, tmp_path, "merged-x", "digest-1", "peft-lora")
    assert log_model_files(two, tmp_path, "merged-x", "digest-1", "peft-lora") == first
    assert log_model_files(two, tmp_path, "merged-y", "digest-1", "peft-lora") != first
    second = log_model_files(two, tmp_path, "merged-x", "digest-2", "peft-lora")
    assert second != first
    model = run.client.get_logged_model(first)
    assert str(model.status) == "READY"
    outputs = run.client.get_run(two.run_id).outputs.model_outputs
    assert {output.model_id for output in outputs} >= {first, second}
    versions = [register_model(one, m, "trial-x") for m in (first, first, second, first)]
    assert versions == ["1", "1", "2", "1"]
    assert str(run.client.get_model_version_by_alias("trial-x", "current").version) == "1"


def test_logged_models_are_ranked_by_their_figures(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    found = {}
    for name, value in {"low": 0.2, "high": 0.9, "middle": 0.5}.items():
        nested = tracking.nested_run(run, name, {})
        found[name] = log_model_files(nested, tmp_path, f"ranked-{name}", f"d-{name}", "peft-lora")
        tracking.log_metrics(nested, {"rank/mean": value, "gap": float("nan")}, found[name])
    order = [{"field_name": "metrics.rank/mean", "ascending": False}]
    ranked = run.client.search_logged_models(
        [run.experiment_id], "metrics.`rank/mean` > 0.3", order_by=order
    )
    assert [model.model_id for model in ranked] == [found["high"], found["middle"]]
    assert [(metric.key, metric.value) for metric in ranked[0].metrics] == [("rank/mean", 0.9)]


def test_logged_models_are_found_by_what_they_were_measured_on(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    frame = pd.DataFrame({"prompt": ["a"], "response": ["b"]})
    found = {}
    for name in ("here", "there"):
        nested = tracking.nested_run(run, name, {})
        rows = dataset_of(frame, "mine.jsonl", f"rows-{name}", "evaluation")
        found[name] = log_model_files(nested, tmp_path, f"on-{name}", f"on-{name}", "peft-lora")
        tracking.log_metrics(nested, {"nll": 0.5}, found[name], rows)
    (model,) = run.client.search_logged_models(
        [run.experiment_id], "metrics.nll < 1", datasets=[{"dataset_name": "rows-there"}]
    )
    assert model.model_id == found["there"]
    (metric,) = model.metrics
    assert (metric.dataset_name, metric.dataset_digest) == ("rows-there", rows.dataset.digest)


def test_a_run_names_its_code_and_its_environment(config, run):
    found = run.client.get_run(run.run_id)
    tags = found.data.tags
    assert tags["tclora.version"] == tclora.__version__
    assert len(tags["tclora.source_sha256"]) == 64
    assert tags["mlflow.user"]
    assert len(tags.get("mlflow.source.git.commit", "0" * 40)) == 40
    place = run.client.download_artifacts(run.run_id, "environment.yaml")
    written = yaml.safe_load(Path(place).read_text())
    assert written["packages"]["pandas"] == pd.__version__
    assert written["python"] == platform.python_version()
    config_file = run.client.download_artifacts(run.run_id, "config.yaml")
    assert parse_config(yaml.safe_load(Path(config_file).read_text())) == config


def test_a_registered_adapter_can_be_downloaded(run, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    (tmp_path / "adapter_config.json").write_text('{"r": 3}')
    model_id = log_model_files(run, tmp_path, "stored", "digest-9", "peft-lora")
    register_model(run, model_id, "stored")
    folder = mlflow.artifacts.download_artifacts(
        "models:/stored@current", dst_path=str(tmp_path / "out")
    )
    files = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.json")}
    assert folder
    assert files["adapter_config.json"] == '{"r": 3}'
