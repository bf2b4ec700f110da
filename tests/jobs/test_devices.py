import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tclora.errors import JobError
from tclora.jobs.devices import exclusive, job_environment, lease_gpus, parallel_jobs, visible_gpus

HOLD = """
import sys, time
from pathlib import Path
from tclora.jobs.devices import exclusive, lease_gpus
path = Path(sys.argv[1])
with exclusive(path) if sys.argv[2] == "lock" else lease_gpus(["0"], folder=path):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(request, tmp_path):
    """Another process that holds the lock, or the only GPU, until it is killed."""
    path = tmp_path / "held"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), request.param], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "held"
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def kill_soon(process):
    timer = threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL))
    timer.start()
    return time.monotonic()


@pytest.mark.parametrize("holder", ["lock"], indirect=True)
def test_a_lock_excludes_another_process_until_it_is_killed(holder):
    path, process = holder
    started, told = kill_soon(process), []
    with exclusive(path, on_wait=told.append):
        assert time.monotonic() - started > 0.4
    (holder_seen,) = told
    assert holder_seen["pid"] == process.pid
    assert 0 < holder_seen["seconds"] < 60
    with exclusive(path, on_wait=told.append):  # free now
        assert len(told) == 1


@pytest.mark.parametrize("holder", ["gpu"], indirect=True)
def test_a_wait_for_a_gpu_ends_when_the_run_is_stopped(holder):
    folder, _ = holder
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    with (
        pytest.raises(JobError, match="when the run was interrupted"),
        lease_gpus(["0"], folder=folder, stopped=stopped),
    ):
        pytest.fail("another process holds it")


@pytest.mark.parametrize("holder", ["gpu"], indirect=True)
def test_leases_are_open_to_all_users_of_a_machine(holder):
    folder, _ = holder
    assert folder.stat().st_mode & 0o1777 == 0o1777
    assert (folder / "gpu0.lock").stat().st_mode & 0o666 == 0o666


@pytest.mark.parametrize("holder", ["gpu"], indirect=True)
def test_a_killed_holder_gives_its_gpu_back(holder):
    folder, process = holder
    with lease_gpus(["0", "1"], folder=folder) as (gpu,):
        assert gpu == "1"
    started = kill_soon(process)
    with lease_gpus(["0"], folder=folder) as (gpu,):
        assert gpu == "0"
        assert time.monotonic() - started > 0.4


def test_leases_are_of_different_gpus_and_return(tmp_path):
    gpus = ["0", "1", "GPU-abc"]
    with (
        lease_gpus(gpus, folder=tmp_path) as [a],
        lease_gpus(gpus, folder=tmp_path) as [b],
        lease_gpus(gpus, folder=tmp_path) as [c],
    ):
        assert {a, b, c} == set(gpus)
    with lease_gpus(gpus, folder=tmp_path) as again:
        assert again == ["0"]


def test_jobs_of_several_gpus_take_turns_without_standing_in_each_others_way(tmp_path):
    """Each of two holds one of two GPUs and waits for the other: that must not come about."""
    done = []

    def work():
        for _ in range(5):
            with lease_gpus(["0", "1"], 2, tmp_path) as gpus:
                done.append(gpus)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    with lease_gpus(["0", "1"], folder=tmp_path) as one:
        assert len(one) == 1
    for thread in threads:
        thread.join(60)
    assert len(done) == 15
    assert all(sorted(gpus) == ["0", "1"] for gpus in done)


def test_more_gpus_than_there_are_cannot_be_leased(tmp_path):
    wanted = r"train.data_parallel=3 must have 3 GPUs, this machine has 2; lower it"
    with pytest.raises(JobError, match=wanted), lease_gpus(["0", "1"], 3, tmp_path):
        pytest.fail("there are two")


def test_more_threads_than_gpus_take_turns(tmp_path):
    holding, most, seen = set(), [], []

    def work():
        with lease_gpus(["0", "1"], folder=tmp_path) as (gpu,):
            assert gpu not in holding
            holding.add(gpu)
            most.append(len(holding))
            time.sleep(0.05)
            holding.remove(gpu)
            seen.append(gpu)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 5
    assert max(most) == 2


def test_a_machine_without_gpu_leases_none(tmp_path):
    with lease_gpus([], folder=tmp_path / "none") as gpus:
        assert gpus == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("value", "wanted"), [("", []), ("-1", []), ("2", ["2"]), ("0, GPU-ab", ["0", "GPU-ab"])]
)
def test_visible_gpus_follow_the_environment(monkeypatch, value, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == wanted


def test_parallel_jobs(monkeypatch):
    assert parallel_jobs(3) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert parallel_jobs("auto") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert parallel_jobs("auto") == 8
    assert job_environment(8)["OMP_NUM_THREADS"] == "8"
    assert job_environment(100)["OMP_NUM_THREADS"] == "1"
    assert job_environment(1, ["0", "2"])["CUDA_VISIBLE_DEVICES"] == "0,2"
