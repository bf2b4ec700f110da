"""Jobs on a worker that shares no path with the run but the store: a real server, pool and worker.

The worker is a process with a home, a temporary folder and a cache of its own. What it trains must
be, byte for byte, what this machine trains.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Cancelling, Completed, Running

from flows.job import job
from flows.pipeline import pipeline
from tasks.attempts import check_source
from tasks.deployed import FlowRuns
from tclora.errors import ConfigError, JobError
from tclora.files import sha256_path
from tclora.jobs.parcel import Parcel
from tclora.jobs.records import JobRecords
from tclora.store.objects import Store
from tests.flows.deployed import (
    POOL,
    ROOT,
    SECRET,
    assert_not_told,
    deployment,
    environment,
    places,
    runs_named,
    state_of,
    take_slot,
    worker,
)
from tests.flows.examples import alpaca_rows, write_rows
from tests.flows.sent import eventually, executor_of, run_job, send_slow_job
from tests.jobs.running import starter_of

__all__ = ["deployment", "environment", "places", "worker"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]


@pytest.fixture
def executor(deployment, places, tmp_path):
    return executor_of(f"file://{places['store']}", tmp_path)


def test_adapters_trained_by_a_worker_are_those_trained_here(
    worker, places, tiny_model_dir, tmp_path
):
    data = write_rows(tmp_path, alpaca_rows())
    settings = {
        "name": "mine", "base_model": str(tiny_model_dir),
        "data": {"path": str(data), "test_fraction": 0.2},
        "cluster": {"k": 2, "min_rows": 4},
        "train": {"r": 2, "batch_size": 8, "template": "plain", "dtype": "float32", "max_steps": 3,
                  "target_modules": ["q_proj"], "joint": False},
        "resources": {"jobs": 2},
    }  # fmt: skip
    sent = {
        "backend": "deployment",
        "store": f"file://{places['store']}",
        "jobs_per_host": 2,
    }
    here = pipeline(settings | {"output": str(tmp_path / "here")}, until="train")
    there = pipeline(
        settings | {"output": str(tmp_path / "there"), "execution": sent}, until="train"
    )
    adapters = [Path(outcome["library"]) / "adapters" for outcome in (here, there)]
    assert sorted(path.name for path in adapters[0].iterdir()) == ["cluster-0", "cluster-1"]
    assert sha256_path(adapters[0]) == sha256_path(adapters[1])
    with get_client(sync_client=True) as client:
        done = [r for r in client.read_flow_runs() if r.name.startswith("train-")]
    assert sorted(run.state.type.value for run in done) == ["COMPLETED", "COMPLETED"]
    assert all(run.parent_task_run_id for run in done)  # children of the run, in the UI too
    # Nothing but the store was shared, and nothing is left of the jobs in it.
    assert (worker / "cache" / "objects").is_dir()
    assert (worker / "cache" / "fetched").is_dir()
    assert list(Store(f"file://{places['store']}").names("jobs")) == []
    assert not list(Path(there["library"]).glob("work/checkpoints/*"))
    # Prefect's worker hands each flow run its environment in a private file, and removes it.
    assert eventually(lambda: not list((worker / "tmp").glob("prefect-workspace-attempt-*")))
    assert_not_told(SECRET, [*places.values(), tmp_path])


def test_the_parameters_have_a_schema_that_refuses_others(deployment):
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("job/job")
        assert found.enforce_parameter_schema
        assert found.pull_steps == []
        with pytest.raises(Exception, match="key"):
            client.create_flow_run_from_deployment(
                found.id, parameters={"store": "file:///x", "key": "../../etc"}
            )
    assert set(job.parameters.properties) == {"store", "key"}


def test_a_domain_error_of_the_worker_is_the_runs(worker, executor):
    with pytest.raises(JobError, match=r"^job fail late: NonFiniteLossError: loss became nan"):
        run_job(executor, "fail", name="late")


def test_a_job_cancelled_in_prefect_ends_with_its_process(worker, executor, tmp_path):
    pids = []

    def cancel(event):
        pids.append(event["pid"])
        (run,) = runs_named("slow")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())

    with pytest.raises(JobError, match="job slow was cancelled in Prefect"):
        run_job(executor, "slow", cancel, target=tmp_path / "cancelled", seconds=300)
    assert eventually(lambda: not Path(f"/proc/{pids[0]}").exists())


def test_a_lost_worker_is_replaced_and_goes_on_where_the_other_was(worker, executor, tmp_path):
    told = []

    def kill(event):
        told.append(event["again"])
        if not event["again"]:
            starter_of(event["pid"]).kill()

    executor.scratch.mkdir()
    places = {"checkpoint": executor.scratch / "c", "target": tmp_path / "target.txt"}
    assert run_job(executor, "hang_once", kill, **places) == "half of it, the rest"
    assert places["target"].read_text() == "half of it, the rest"
    assert told == [False, True]
    states = sorted(run.state.type.value for run in runs_named("hang_once"))
    assert states == ["COMPLETED", "CRASHED"]


def test_a_killed_run_finds_its_job_again(worker, places, tmp_path):
    from prefect.settings import PREFECT_API_URL

    given = [f"file://{places['store']}", str(tmp_path)]
    own = {"PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT)}
    send = "import sys; from tests.flows.sent import send_slow_job; send_slow_job(*sys.argv[1:])"
    command = [sys.executable, "-c", send, *given]
    before = {run.id for run in runs_named("slow")}
    with subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL) as parent:
        while not [r for r in runs_named("slow") if r.id not in before and r.state.is_running()]:
            time.sleep(0.5)
            assert parent.poll() is None
        parent.kill()
    assert send_slow_job(*given) > 0
    assert (tmp_path / "target.txt").read_text() == "late"
    (run,) = [run for run in runs_named("slow") if run.id not in before]
    assert run.state.is_completed()


def test_a_store_that_does_not_answer_says_nothing_of_the_worker(
    worker, places, tmp_path, monkeypatch
):
    """What a worker has told meanwhile is read when the store answers again."""
    executor = executor_of(f"file://{places['store']}", tmp_path, retries=0, lost_after=8)
    read, heard, looks = JobRecords.delivery, [], []

    def delivery(records):
        if heard:
            looks.append(time.monotonic())
            if len(looks) == 2:  # nothing is heard between the last look and this one
                time.sleep(12)
        return read(records)

    monkeypatch.setattr(JobRecords, "delivery", delivery)
    target = tmp_path / "target.txt"
    assert run_job(executor, "slow", heard.append, target=target, seconds=20) > 0
    assert looks[2] - looks[1] > 12
    assert target.read_text() == "late"


def test_a_job_without_a_sign_of_life_is_given_up(deployment, places, tmp_path):
    """Its worker's machine is gone: nobody else could say that it has crashed."""
    executor = executor_of(f"file://{places['store']}", tmp_path, retries=0, lost_after=1)
    with get_client(sync_client=True) as client:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))

    def take():
        with get_client(sync_client=True) as client:
            while not (runs := runs_named("own_pid")):
                time.sleep(0.2)
            client.set_flow_run_state(runs[0].id, Running(), force=True)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        with pytest.raises(JobError, match=r"lost its worker 1 times.* gave no sign for 1 s"):
            run_job(executor, "own_pid")
    finally:
        thread.join()


@pytest.fixture
def one_slot(deployment):
    with get_client(sync_client=True) as client:
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
        yield
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=None))


def test_a_run_that_nobody_works_on_gives_its_slot_to_others(worker, one_slot, places, tmp_path):
    """Whoever sent it has ended, and its worker's machine was switched off."""
    store = f"file://{places['store']}"
    lost = take_slot(store)
    assert run_job(executor_of(store, tmp_path, lost_after=2), "own_pid") > 0
    state = state_of(lost)
    assert state.type.value == "CRASHED"
    assert "kept a slot from others" in state.message


def test_a_run_of_another_store_is_not_judged(worker, one_slot, places, tmp_path):
    """What is not to be seen from here may well be alive."""
    other = take_slot(f"file://{tmp_path}/elsewhere")
    executor = executor_of(f"file://{places['store']}", tmp_path, lost_after=8)

    def free():
        time.sleep(16)
        free.seen = state_of(other).type.value
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(other, Completed(), force=True)

    thread = threading.Thread(target=free)
    thread.start()
    assert run_job(executor, "own_pid") > 0
    thread.join()
    assert free.seen == "RUNNING"


def test_a_run_that_works_keeps_its_slot(worker, one_slot, places, tmp_path):
    store = f"file://{places['store']}"
    before = {run.id for run in runs_named("slow")}
    sender = threading.Thread(target=send_slow_job, args=(store, str(tmp_path / "other")))
    (tmp_path / "other").mkdir()
    sender.start()
    while not [r for r in runs_named("slow") if r.id not in before and r.state.is_running()]:
        time.sleep(0.5)
    assert run_job(executor_of(store, tmp_path, lost_after=8), "own_pid") > 0
    sender.join()
    (run,) = [run for run in runs_named("slow") if run.id not in before]
    assert run.state.is_completed()


def test_a_deployment_that_is_not_there_is_named(prefect_server):
    with pytest.raises(ConfigError, match=r"execution.deployment must be known .* 'job/none'"):
        FlowRuns("job/none", 60).check()


def test_a_worker_with_other_code_refuses_a_job():
    parcel = Parcel(
        function="tclora.train.engines:train_adapters", arguments={}, slots=[], source="x"
    )
    with pytest.raises(JobError, match="install the same version on both"):
        check_source(parcel)
