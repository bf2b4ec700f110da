"""Jobs forked from a process with the imports, and what must start one from nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import tclora
from tclora.config import AdapterConfig
from tclora.errors import JobError
from tclora.jobs import processes
from tclora.jobs.run import LocalExecutor
from tclora.train.course import total_steps
from tests.jobs import functions, heavy
from tests.jobs.running import running_jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs are forked on Linux alone")
CALLER = """
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions

LocalExecutor().run_isolated(functions.own_pid)
LocalExecutor().run_isolated(functions.endless, on_event=lambda event: print(event, flush=True))
"""
COPIED = """
import os
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions

of_original = LocalExecutor().run_isolated(functions.parent_pid)
assert of_original != os.getpid()
copy = os.fork()
print(LocalExecutor().run_isolated(functions.parent_pid) != of_original, flush=True)
if copy:
    os.waitpid(copy, 0)
"""
COPIED_MEANWHILE = """
import os, signal, threading, time
from tclora.jobs import processes
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions

asked, ended, send = threading.Event(), threading.Event(), processes._SERVERS._sent

def send_late(message, files):
    asked.set()
    time.sleep(1)
    return send(message, files)

def work():
    LocalExecutor().run_isolated(functions.own_pid)
    ended.set()

processes._SERVERS._sent = send_late
threading.Thread(target=work).start()
asked.wait()
copy = os.fork()
if not copy:
    time.sleep(200)
    os._exit(0)
print(ended.wait(60), flush=True)
os.kill(copy, signal.SIGKILL)
"""
CHANGING = """
import os, sys
import tclora.changing
from pathlib import Path
from tclora.jobs.run import LocalExecutor
from tclora.jobs import processes

def job():
    print(LocalExecutor().run_isolated(tclora.changing.value))
    print(processes._SERVERS.server.process.poll() is None)

job()
file = Path(sys.argv[1])
before = file.stat()
file.write_text(file.read_text().replace("1", "2"))
os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns - 10**10))  # an older one
job()
job()
"""


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return LocalExecutor()


def parent_of(executor):
    return executor.run_isolated(functions.parent_pid)


def steps(executor):
    return executor.run_isolated(total_steps, n_rows=8, config=AdapterConfig())


def server():
    return psutil.Process(processes._SERVERS.server.process.pid)


def test_jobs_share_what_one_process_has_imported(executor):
    parent = parent_of(executor)
    assert parent == server().pid != os.getpid()
    assert parent_of(executor.shared_by(2)) == parent


def test_what_forks_has_a_single_thread_with_all_imports(executor):
    steps(executor)
    assert any("libtorch" in library.path for library in server().memory_maps())
    names = [name.read_text() for name in Path(f"/proc/{server().pid}/task").glob("*/comm")]
    # Arrow's allocator has one of its own, and stops it for the moment of a fork.
    assert len([name for name in names if not name.startswith("jemalloc")]) == 1


@pytest.mark.parametrize("beside", [1, 2])
def test_libraries_that_were_imported_before_use_the_jobs_share_of_the_cores(
    executor, beside, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    executor = LocalExecutor(slots=2).shared_by(beside)
    steps(executor)
    assert set(executor.run_isolated(heavy.thread_limits)) == {6 // beside}


def test_libraries_see_the_environment_that_they_would_be_imported_with(executor, monkeypatch):
    first = parent_of(executor)
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert executor.run_isolated(functions.variable, name="HF_HOME") == "/elsewhere"
    assert parent_of(executor) != first
    assert not psutil.pid_exists(first) or psutil.Process(first).wait(20) is not None


def test_a_job_works_in_the_folder_of_its_caller(executor, monkeypatch, tmp_path):
    parent = parent_of(executor)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    assert executor.run_isolated(functions.folder) == tmp_path
    assert parent_of(executor) not in {parent, os.getpid()}


def test_plugins_and_their_functions_are_imported_by_each_job(executor, tmp_path, monkeypatch):
    source = tmp_path / "changing.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    found = []
    for value in (1, 2):
        source.write_text(f"def value() -> int:\n    return {value}\n" + "#" * value)
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        import changing

        found += [executor.run_isolated(changing.value) for _ in range(2)]
    assert found == [1, 1, 2, 2]


def test_changed_source_of_the_package_is_imported_anew(tmp_path):
    package = tmp_path / "tclora"
    shutil.copytree(Path(tclora.__file__).parent, package)
    (package / "changing.py").write_text("def value() -> int:\n    return 1\n")
    done = subprocess.run(
        [sys.executable, "-c", CHANGING, str(package / "changing.py")], cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "True", "2", "False", "2", "True"], done.stderr


def test_a_module_that_cannot_be_imported_is_told_as_by_a_new_process(executor, monkeypatch):
    parent_of(executor)
    lost = server()
    monkeypatch.setattr(functions.own_pid, "__module__", "tclora.no_such_module")
    with pytest.raises(JobError, match=r"No module named 'tclora\.no_such_module'"):
        executor.run_isolated(functions.own_pid)
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert parent_of(executor) not in {lost.pid, os.getpid()}


@pytest.fixture
def silent(executor):
    """A server that answers nothing until it is told to go on."""
    parent_of(executor)
    found = server()
    found.suspend()
    yield found
    with suppress(psutil.NoSuchProcess):
        found.kill()


def while_waiting(monkeypatch, act):
    """Do something while a job's start waits for the server."""
    waits = processes._told_first

    def acting(told, limits):
        act()
        return waits(told, limits)

    monkeypatch.setattr(processes, "_told_first", acting)


def test_a_server_that_dies_of_a_request_leaves_the_job_to_a_new_process(
    executor, silent, monkeypatch
):
    with monkeypatch.context() as patch:
        while_waiting(patch, silent.kill)
        assert parent_of(executor) == os.getpid()
    assert parent_of(executor) not in {silent.pid, os.getpid()}


def test_a_stopped_executor_does_not_wait_for_imports(executor, silent, monkeypatch):
    while_waiting(monkeypatch, executor.stop)
    with pytest.raises(JobError, match="was killed"):
        executor.run_isolated(functions.endless)


def test_imports_count_towards_a_jobs_time(silent):
    begin = time.monotonic()
    with pytest.raises(JobError, match="its time limit of 1 s"):
        LocalExecutor(timeout=1).run_isolated(functions.endless)
    assert time.monotonic() - begin < 60
    silent.wait(20)  # it hangs, and was killed


def test_a_caller_that_gives_up_does_no_harm_to_other_jobs(executor, monkeypatch):
    others, code = LocalExecutor(), []

    def give_up(event):
        found = server()
        found.suspend()
        while_waiting(monkeypatch, executor.stop)
        with pytest.raises(JobError, match="was killed"):
            executor.run_isolated(functions.endless)
        found.resume()
        code.append(found.pid)
        os.kill(event["pid"], signal.SIGTERM)

    with pytest.raises(JobError, match="was ended by SIGTERM"):
        others.run_isolated(functions.endless, on_event=give_up)
    assert [server().pid] == code
    _, alive = psutil.wait_procs(list(running_jobs().values()), timeout=30)
    assert not alive  # what was given up is killed as soon as the server sees it


def test_a_job_whose_server_dies_goes_on(executor, tmp_path):
    def kill(event):
        server().kill()

    target = tmp_path / "target.txt"
    assert executor.run_isolated(functions.slow, target=target, seconds=0.5, on_event=kill) > 0
    assert target.read_text() == "late"


def test_a_job_with_a_gpu_starts_from_nothing(executor, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("tclora.jobs.devices._LEASES", tmp_path)
    assert parent_of(executor) == os.getpid()


def test_a_copy_of_a_process_has_a_server_of_its_own():
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", COPIED]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert sorted(done.stdout.split()) == ["False", "True"]
    assert done.stderr == ""


def test_a_copy_that_is_made_while_a_job_is_asked_for_does_not_keep_it_from_ending():
    done = subprocess.run(
        [sys.executable, "-c", COPIED_MEANWHILE], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "True\n"


def test_a_killed_parent_leaves_neither_job_nor_server():
    with subprocess.Popen(
        [sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    ) as parent:  # fmt: skip
        assert "pid" in parent.stdout.readline()
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 2
        parent.kill()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
