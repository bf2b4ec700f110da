"""Progress of jobs where there is no terminal: a few lines of the log per job."""

import logging

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.context import TaskRunContext
from prefect.logging import disable_run_logger

from tasks import progress
from tasks.progress import JobProgress


@pytest.fixture
def lines(monkeypatch):
    written = []

    class Lines(logging.Handler):
        def emit(self, record):
            written.append(record.getMessage())

    logger = logging.Logger("lines")
    logger.addHandler(Lines())
    monkeypatch.setattr(progress, "get_run_logger", lambda: logger)
    return written


def test_a_job_of_many_steps_says_four_lines(lines):
    shown = JobProgress()
    with disable_run_logger(), shown.shown():
        for step in range(1, 101):
            shown.update("cluster-0", step, 100, "loss 1.000")
            shown.update("cluster-1", step, 0, "nothing to do")
    assert lines == [f"cluster-0: {n} of 100, loss 1.000" for n in (25, 50, 75, 100)]


def test_a_second_block_counts_anew(lines):
    shown = JobProgress()
    for _ in range(2):
        with shown.shown():
            shown.update("base", 8, 8, "rows")
    assert lines == ["base: 8 of 8, rows"] * 2


def test_prefect_shows_each_jobs_progress(prefect_server):
    shown = JobProgress()

    @task
    def job(name):
        for step in range(1, 101):
            shown.update(name, step, 100, f"loss {100 - step}")
        return str(TaskRunContext.get().task_run.id)

    @flow(name="jobs")
    def jobs():
        return {name: job(name) for name in ("cluster-0", "cluster-1")}

    runs = jobs()
    with get_client(sync_client=True) as api:
        artifacts = {str(a.task_run_id): a for a in api.read_artifacts() if a.type == "progress"}
    found = {run_id: artifacts[run_id] for run_id in runs.values()}  # a server may have others
    assert len(found) == 2
    for name, run_id in runs.items():
        assert found[run_id].data == 100.0
        assert found[run_id].description == f"{name}: 100 of 100, loss 0"
