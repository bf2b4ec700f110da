"""Jobs on a worker that shares no path with the run but the store: a real server, pool and worker.

The worker is a process with a home, a temporary folder and a cache of its own. What it trains must
be, byte for byte, what this machine trains.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterTags,
)

from flows.job import job
from flows.pipeline import pipeline
from tasks.deployed import DeploymentExecutor
from tasks.keys import stage
from tasks.progress import JobProgress
from tasks.where import Where
from tclora.config import ExecutionConfig
from tclora.files import sha256_path
from tclora.library.layout import Layout
from tclora.store.objects import Store
from tests.flows.test_pipeline import alpaca_rows, write_rows

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
POOL = "gpu-pool"


def runs_with(tag=None):
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])) if tag else FlowRunFilter()
    named = DeploymentFilter(name=DeploymentFilterName(any_=["job"]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=wanted, deployment_filter=named)


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
        process.wait(30)


@pytest.fixture
def executor(deployment, places, tmp_path):
    config = ExecutionConfig(backend="deployment", store=f"file://{places['store']}")
    return DeploymentExecutor(config, tmp_path / "scratch", pause=0.5)


def run_stage(executor, function, **arguments):
    """Run a job as a stage does."""

    @stage("trial")
    def trial(function, where):
        return where.executor.run_isolated(function, **arguments)

    @flow(validate_parameters=False)
    def around(where):
        return trial.with_options(cache_policy=None, persist_result=False)(
            f"{function.__module__}:{function.__name__}", where
        )

    return around(Where(Layout(executor.scratch.parent), None, executor, JobProgress()))


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
    done = [run for run in runs_with() if run.name.startswith("train_adapters")]
    assert sorted(run.state.type.value for run in done) == ["COMPLETED", "COMPLETED"]
    assert all(run.parent_task_run_id for run in done)  # children of the run, in the UI too
    # Nothing but the store was shared, and nothing is left of the jobs in it.
    assert (worker / "cache" / "objects").is_dir()
    assert (worker / "cache" / "fetched").is_dir()
    assert list(Store(f"file://{places['store']}").names("jobs")) == []
    assert not list(Path(there["library"]).glob("work/checkpoints/*"))


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
