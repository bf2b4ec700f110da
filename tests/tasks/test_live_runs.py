"""Jobs in MLflow while they work: what they tell arrives, whatever becomes of them."""

import logging

import pytest
from mlflow.exceptions import MlflowException

from tasks import live_runs, tracking
from tclora.config import parse_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = parse_config({"name": "trial", "output": str(tmp_path_factory.mktemp("runs"))})
    return tracking.open_run(config, "first", {})


def test_a_nested_run_receives_records_and_finishes(run):
    with live_runs.live_run(run, "cluster-0", {"tclora.kind": "train"}) as live:
        for step in range(5):
            live.add({"step": step, "loss": 2.0 - step / 4, "lr": 1e-3})
    found = run.client.get_run(live.run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == run.run_id
    assert found.data.tags["tclora.kind"] == "train"
    curve = run.client.get_metric_history(live.run.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [
        (step, 2.0 - step / 4) for step in range(5)
    ]


def fail_in(run, name="cluster-1"):
    with live_runs.live_run(run, name, {}) as live:
        live.add({"step": 0, "loss": 1.0})
        raise RuntimeError("no room")


def test_an_exception_marks_the_nested_run_and_keeps_its_records(run):
    with pytest.raises(RuntimeError, match="no room"):
        fail_in(run)
    (found,) = run.client.search_runs([run.experiment_id], "attributes.run_name = 'cluster-1'")
    assert found.info.status == "FAILED"
    assert found.data.tags["tclora.error"] == "no room"
    assert found.data.metrics == {"loss": 1.0}


def test_a_store_that_has_gone_ends_no_job(run, monkeypatch, caplog):
    def refuse(*_):
        raise MlflowException("gone")

    monkeypatch.setattr(live_runs, "get_run_logger", lambda: logging.getLogger("live runs"))
    monkeypatch.setattr(live_runs, "close_run", refuse)
    with live_runs.live_run(run, "cluster-2", {}) as live:
        live.add({"step": 0, "loss": 1.0})
    assert "MLflow was not told that a job is finished: gone" in caplog.text
    with pytest.raises(RuntimeError, match="no room"):
        fail_in(run, "cluster-3")


def test_a_long_history_is_logged_whole(run):
    nested = tracking.nested_run(run, "long", {})
    live_runs.log_history(nested, [{"step": i, "loss": i / 7, "lr": 0.1} for i in range(700)])
    curve = run.client.get_metric_history(nested.run_id, "loss")
    assert [point.value for point in curve] == [i / 7 for i in range(700)]
