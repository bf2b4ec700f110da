"""Jobs on Ray and Dask: clusters of a run's own with a worker that is killed, and workers apart.

What is trained must be, byte for byte, what this machine trains without any cluster.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows.pipeline import pipeline
from tasks.fleet import gpus_asked
from tclora.errors import ConfigError, JobError
from tclora.files import sha256_path
from tclora.jobs.records import JobRecords
from tclora.library.manifest import verify
from tclora.library.places import job_store
from tclora.store.objects import Store
from tests.flows.clusters import (
    COMMANDS,
    CONNECT,
    Apart,
    Killer,
    answers,
    assert_same_library,
    await_workers,
    free_port,
    needing,
)
from tests.flows.examples import alpaca_rows, write_rows
from tests.flows.sent import eventually, executor_of, run_job
from tests.jobs.running import starter_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


both = pytest.mark.parametrize("backend", [needing("dask"), needing("ray")])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def environment(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLORA_CACHE", str(cache))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("TCLORA_PLUGINS", "tests.jobs.functions")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # the loopback: `tasks.ray_tasks`
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model_dir):
    data = write_rows(tmp_path_factory.mktemp("data"), alpaca_rows())
    return {
        "name": "mine", "base_model": str(tiny_model_dir),
        "data": {"path": str(data), "test_fraction": 0.2},
        "cluster": {"k": 3, "min_rows": 4},
        "train": {
            "r": 2, "batch_size": 8, "template": "plain", "dtype": "float32", "max_steps": 150,
            "epochs": 200, "checkpoint_steps": 1, "target_modules": ["q_proj"], "joint": False,
        },
        "factorise": {"rank": 2, "ranks": [1], "n_starts": 1, "n_iter": 5},
        "merge": {"methods": ["uniform"], "primary": "uniform", "sample_rows": 0},
        "evaluate": {"generate": False, "resamples": 50},
        "route": {"enabled": False},
        "resources": {"jobs": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained_here(settings, tmp_path_factory, prefect_server, environment):
    """The library that processes of this machine make, without any cluster."""
    return Path(pipeline(settings | {"output": str(tmp_path_factory.mktemp("here"))})["library"])


@both
def test_a_run_goes_on_after_a_worker_was_killed(backend, settings, trained_here, cache, tmp_path):
    sent = {"output": str(tmp_path), "execution": {"backend": backend}}
    store = job_store(tmp_path / "mine")
    with Killer(cache, store) as killer:
        library = Path(pipeline(settings | sent)["library"])
    attempts = Counter(killer.processes.values())
    assert killer.killed
    assert killer.finished
    assert attempts.pop(killer.killed) == 2
    assert set(attempts.values()) == {1}
    assert killer.finished <= set(attempts)
    assert verify(library) == []
    assert_same_library(library, trained_here)
    assert not store.exists()


@pytest.mark.parametrize(
    ("asked", "largest", "most", "wanted"),
    [("auto", 0, 4, 0), ("auto", 4, 4, 1), ("auto", 8, 1, 1), (1, 0, 4, 1), (0, 8, 4, 0)],
)
def test_jobs_ask_for_gpus_where_there_are_some(asked, largest, most, wanted):
    assert gpus_asked(asked, largest, most, "a Ray node") == wanted


def test_a_job_that_no_machine_of_a_cluster_could_take_is_refused():
    message = (
        r"train.data_parallel must be at most the GPUs of a Ray node, got 4, the largest has 2; "
        r"lower it, or set execution.gpus_per_job=1 to wait for a larger one"
    )
    with pytest.raises(ConfigError, match=message):
        gpus_asked("auto", 2, 4, "a Ray node")


@both
def test_a_cluster_of_a_runs_own_listens_on_the_loopback_alone(backend):
    former = signal.getsignal(signal.SIGTERM)
    before = set(psutil.Process().children(recursive=True))
    with CONNECT[backend](None, "auto", 1) as fleet:
        assert fleet.gpus == 0
        started = set(psutil.Process().children(recursive=True)) - before
        listening = [
            (process, port.laddr.ip.removeprefix("::ffff:"))
            for process in (psutil.Process(), *started)
            for port in process.net_connections("tcp")
            if port.status == psutil.CONN_LISTEN
        ]
    servers = {process for process, _ in listening} & started
    assert servers
    assert {address for _, address in listening} == {"127.0.0.1"}
    assert signal.getsignal(signal.SIGTERM) is former
    assert eventually(lambda: not any(process.is_running() for process in servers))


@pytest.fixture(scope="module", params=[needing("dask"), needing("ray")])
def apart(request, tmp_path_factory):
    """A cluster whose workers have nothing in common with this process but the store."""
    home = tmp_path_factory.mktemp("worker")
    (home / "tmp").mkdir()
    own = {
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "RAY_TMPDIR": tempfile.gettempdir(),  # paths of sockets must be short
        "TCLORA_CACHE": str(home / "cache"),
    }
    commands, address = COMMANDS[request.param](free_port())
    with (home / "log").open("wb") as log:
        started = [
            subprocess.Popen(command, env=os.environ | own, cwd=home, stdout=log, stderr=log)
            for command in commands
        ]
        tree = []
        try:
            assert eventually(lambda: answers(address)), (home / "log").read_text()
            if request.param == "dask":
                await_workers(address, 2)
            yield Apart(request.param, address, home)
        finally:
            for process in started:
                tree += [process, *psutil.Process(process.pid).children(recursive=True)]
            for process in tree:
                with suppress(psutil.Error):
                    process.kill()
            for process in started:
                process.wait()


@pytest.fixture(scope="module")
def fleet(apart):
    with CONNECT[apart.backend](apart.address, "auto", 2) as found:
        yield found


@pytest.fixture
def executor(apart, fleet, tmp_path):
    (tmp_path / "scratch").mkdir()
    return executor_of(apart.store, tmp_path, fleet)


def test_workers_apart_train_what_this_machine_trains(
    apart, fleet, settings, trained_here, tmp_path
):
    sent = {
        "backend": apart.backend,
        f"{apart.backend}_address": apart.address,
        "store": apart.store,
        "jobs_per_host": 2,
    }
    given = settings | {"output": str(tmp_path), "execution": sent}
    library = Path(pipeline(given, until="train")["library"])
    assert sha256_path(library / "adapters") == sha256_path(trained_here / "adapters")
    assert (apart.home / "cache" / "objects").is_dir()
    assert (apart.home / "cache" / "fetched").is_dir()  # the model, which is a folder here
    assert list(Store(apart.store).names("jobs")) == []


def test_jobs_ask_for_a_gpu_where_workers_have_some(apart, fleet):
    assert fleet.gpus == (apart.backend == "dask")  # Ray has found that there is none


def test_a_domain_error_of_a_worker_is_the_runs(executor):
    with pytest.raises(JobError, match=r"^job fail late: NonFiniteLossError: loss became nan"):
        run_job(executor, "fail", name="late")


def test_a_lost_worker_is_replaced_and_the_job_goes_on_where_it_was(executor, tmp_path):
    told = []

    def kill(event):
        told.append(event["again"])
        if not event["again"]:
            starter_of(event["pid"]).kill()

    places = {"checkpoint": executor.scratch / "c", "target": tmp_path / "target.txt"}
    assert run_job(executor, "hang_once", kill, **places) == "half of it, the rest"
    assert places["target"].read_text() == "half of it, the rest"
    assert told == [False, True]


def test_workers_that_are_lost_again_and_again_are_named(apart, fleet, tmp_path):
    executor = executor_of(apart.store, tmp_path, fleet, retries=0)

    def kill(event):
        starter_of(event["pid"]).kill()

    with pytest.raises(JobError, match=r"^job endless lost its worker 1 times, at last: .* died"):
        run_job(executor, "endless", kill)


def test_an_interrupted_run_ends_its_jobs(executor):
    pids = []

    def stop(event):
        pids.append(event["pid"])
        executor.stop()

    with pytest.raises(JobError, match="job endless was ended: the run was interrupted"):
        run_job(executor, "endless", stop)
    assert eventually(lambda: not psutil.pid_exists(pids[0]))


def test_a_killed_run_leaves_no_job_behind(apart, executor, tmp_path):
    """Ray and Dask tell workers when the one that wants a task is gone."""
    from prefect.settings import PREFECT_API_URL

    send = "import sys; from tests.flows.clusters import send_endless; send_endless(*sys.argv[1:])"
    command = [sys.executable, "-c", send, apart.backend, apart.address, apart.store, str(tmp_path)]
    own = {"PREFECT_API_URL": PREFECT_API_URL.value()}
    with subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline().split()[-1])
        assert psutil.pid_exists(pid)
        parent.kill()
    assert eventually(lambda: not psutil.pid_exists(pid))


def test_an_attempt_is_made_once(tmp_path):
    records = JobRecords(Store(f"file://{tmp_path}/store"), "ab" * 32)
    assert records.begin("1")
    assert not records.begin("1")
    assert records.begin("2")
