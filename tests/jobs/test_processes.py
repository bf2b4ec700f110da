"""Jobs forked from a process with the imports, and what must start one from nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tclora.errors import JobError
from tclora.jobs import processes
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions, heavy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs are forked on Linux alone")
PARENTS = """
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions

LocalExecutor().run_isolated(functions.own_pid)
LocalExecutor().run_isolated(functions.endless, on_event=lambda event: print(event, flush=True))
"""


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return LocalExecutor()


def parent_of(executor):
    return executor.run_isolated(functions.parent_pid)


def server():
    return psutil.Process(processes._SERVERS.server.process.pid)


def test_jobs_share_what_one_process_has_imported(executor):
    parent = parent_of(executor)
    assert parent == server().pid != os.getpid()
    assert parent_of(executor.shared_by(2)) == parent


def test_what_forks_has_a_single_thread_with_all_imports(executor):
    executor.run_isolated(heavy.thread_limits)
    assert any("libtorch" in library.path for library in server().memory_maps())
    names = [name.read_text() for name in Path(f"/proc/{server().pid}/task").glob("*/comm")]
    # Arrow's allocator has one of its own, and stops it for the moment of a fork.
    assert len([name for name in names if not name.startswith("jemalloc")]) == 1


@pytest.mark.parametrize("beside", [1, 2])
def test_libraries_that_were_imported_before_use_the_jobs_share_of_the_cores(
    executor, beside, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    found = LocalExecutor(slots=2).shared_by(beside).run_isolated(heavy.thread_limits)
    assert set(found) == {6 // beside}


def test_libraries_see_the_environment_that_they_would_be_imported_with(executor, monkeypatch):
    first = parent_of(executor)
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert executor.run_isolated(functions.variable, name="HF_HOME") == "/elsewhere"
    assert parent_of(executor) != first
    assert not psutil.pid_exists(first) or psutil.Process(first).wait(20) is not None


def test_a_job_works_in_the_folder_of_who_started_it(executor, monkeypatch, tmp_path):
    parent = parent_of(executor)
    monkeypatch.chdir(tmp_path)
    assert executor.run_isolated(functions.folder) == tmp_path
    assert parent_of(executor) == parent


def test_changed_source_is_imported_anew(executor, tmp_path, monkeypatch):
    source = tmp_path / "changing.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    found = []
    for value in (1, 2):
        source.write_text(f"def value() -> int:\n    return {value} + 0\n" + "#" * value)
        os.utime(source, (time.time() + value,) * 2)  # later than any import of it
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        import changing

        found += [executor.run_isolated(changing.value) for _ in range(2)]
    assert found == [1, 1, 2, 2]


def test_without_the_server_a_job_starts_from_nothing(executor):
    lost = parent_of(executor)
    running = server()
    os.kill(lost, signal.SIGSTOP)  # it takes the request and never answers
    os.kill(lost, signal.SIGKILL)
    running.wait(20)
    assert parent_of(executor) not in {lost, os.getpid()}  # another server was started


def test_a_server_that_dies_of_a_request_leaves_the_job_to_a_fresh_process(executor):
    parent_of(executor)
    os.kill(server().pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (server().pid, signal.SIGKILL)).start()
    assert parent_of(executor) == os.getpid()


def test_a_job_whose_server_dies_goes_on(executor, tmp_path):
    def kill(event):
        server().kill()

    target = tmp_path / "target.txt"
    assert executor.run_isolated(functions.slow, target=target, seconds=0.5, on_event=kill) > 0
    assert target.read_text() == "late"


def test_a_stopped_executor_does_not_wait_for_imports(executor):
    parent_of(executor)
    asleep = server().pid
    os.kill(asleep, signal.SIGSTOP)
    threading.Timer(0.5, executor.stop).start()
    with pytest.raises(JobError, match="was killed"):
        executor.run_isolated(functions.endless)
    os.kill(asleep, signal.SIGKILL)


def test_a_job_with_a_gpu_starts_from_nothing(executor, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("tclora.jobs.devices._LEASES", tmp_path)
    assert parent_of(executor) == os.getpid()


def test_a_killed_parent_leaves_neither_job_nor_server():
    with subprocess.Popen(
        [sys.executable, "-c", PARENTS], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    ) as parent:  # fmt: skip
        assert "pid" in parent.stdout.readline()
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 2
        parent.kill()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
