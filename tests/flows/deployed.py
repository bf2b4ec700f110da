"""A pool with the deployment of jobs, and a worker that shares no path with the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.states import Running

ROOT = Path(__file__).parents[2]
POOL = "gpu-pool"
SECRET = "planted-4711-secret"  # in the environment of the run and of the worker


def runs_named(name):
    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs() if run.name == name]


def assert_not_told(secret, folders):
    """Search every file of the run, and what the server knows: parameters, logs, artifacts."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    with get_client(sync_client=True) as client:
        runs, logs, artifacts = client.read_flow_runs(), client.read_logs(), client.read_artifacts()
    assert runs
    assert logs
    for found in (*runs, *logs, *artifacts):
        assert secret not in found.model_dump_json()


@pytest.fixture(scope="module")
def deployment(prefect_server):
    """The pool and the deployment, as `prefect deploy` makes them of the file."""
    from prefect.settings import PREFECT_API_URL

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", "job",
         "--prefect-file", "deployments/prefect.yaml"],
        cwd=ROOT, env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in ("parent", "worker", "store")}


@pytest.fixture(scope="module", autouse=True)
def environment(places):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLORA_CACHE", str(places["parent"] / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        yield


@pytest.fixture(scope="module")
def worker(deployment, places):
    """A worker on a machine of its own, as far as paths go."""
    from prefect.settings import PREFECT_API_URL

    home = places["worker"]
    (home / "tmp").mkdir()
    own = {
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "TCLORA_CACHE": str(home / "cache"),
        "TCLORA_PLUGINS": "tests.jobs.functions",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_PREFETCH_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", "2"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        yield home
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for jobs that a test has left to it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def take_slot(store):
    """Make a run that is said to run."""
    with get_client(sync_client=True) as client:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
        found = client.read_deployment_by_name("job/job")
        made = client.create_flow_run_from_deployment(
            found.id, parameters={"store": store, "key": "a" * 64}
        )
        client.set_flow_run_state(made.id, Running(), force=True)
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
    return made.id


def state_of(run):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state
