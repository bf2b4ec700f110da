"""Jobs in processes of their own: real ones, killed, too long, failing, interrupted."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tclora.errors import JobError, NonFiniteLossError
from tclora.jobs.call import Call
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions
from tests.jobs.functions import Point
from tests.jobs.running import running_jobs


@pytest.fixture
def executor():
    return LocalExecutor()


def test_a_function_comes_back_with_its_typed_result(executor, tmp_path):
    (tmp_path / "a.txt").write_text("seven!!")
    given = {"name": "one", "points": {"p": Point(x=1, y=2.5)}, "file": tmp_path / "a.txt"}
    events = []
    found = executor.run_isolated(functions.describe, **given, on_event=events.append)
    assert found == functions.describe(**given)
    assert isinstance(found, functions.Description)
    assert found.total == {"p": 3.5}
    assert found.pid is None or found.pid > 0
    assert events == [{"step": 0}, {"step": 1}]


def test_it_runs_in_another_process(executor):
    assert executor.run_isolated(functions.own_pid) != os.getpid()


def test_what_it_prints_is_no_message(executor):
    assert executor.run_isolated(functions.chatty, text='{"result": 5}\n') == 3


def test_arguments_are_checked_before_anything_starts(executor):
    with pytest.raises(TypeError, match="missing a required argument: 'text'"):
        executor.run_isolated(functions.chatty)
    with pytest.raises(ValueError, match="text"):
        executor.run_isolated(functions.chatty, text=["no", "text"])
    with pytest.raises(TypeError, match="must be given by keyword"):
        executor.run_isolated(functions.chatty, "text")
    with pytest.raises(TypeError, match="at the top level of its module"):
        Call.of(lambda: 1, {})


def test_a_domain_error_comes_back_with_its_message(executor):
    message = "job fail late: NonFiniteLossError: loss became nan at step 0"
    with pytest.raises(JobError, match=message):
        executor.run_isolated(functions.fail, name="late")
    with pytest.raises(NonFiniteLossError):
        functions.fail(name="late")


def test_any_other_error_shows_its_traceback(executor):
    with pytest.raises(JobError, match=r"(?s)exit code 1; it said last:.*ZeroDivisionError"):
        executor.run_isolated(functions.divide, by=0)


def test_a_killed_job_names_the_cause(executor):
    def kill(event):
        os.kill(event["pid"], signal.SIGKILL)

    with pytest.raises(JobError, match=r"job endless was killed .*lack of memory"):
        executor.run_isolated(functions.endless, on_event=kill)


def test_a_job_ended_from_outside_names_the_signal(executor):
    with pytest.raises(JobError, match="job endless was ended by SIGTERM"):
        executor.run_isolated(
            functions.endless, on_event=lambda event: os.kill(event["pid"], signal.SIGTERM)
        )


def test_a_job_that_takes_too_long_is_stopped():
    with pytest.raises(JobError, match="its time limit of 1 s"):
        LocalExecutor(timeout=1).run_isolated(functions.endless)
    assert not running_jobs()


def test_an_exception_of_the_callback_ends_the_job(executor):
    seen = []

    def fail(event):
        seen.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run_isolated(functions.endless, on_event=fail)
    assert seen
    assert not running_jobs()


def test_a_stopped_executor_ends_its_jobs_and_starts_none(executor):
    begun = threading.Event()
    outcome = []

    def work():
        try:
            executor.run_isolated(functions.endless, on_event=lambda _: begun.set())
        except JobError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    executor.shared_by(2).stop()  # the same processes, however the cores are shared
    thread.join(20)
    assert "was killed" in outcome[0]
    with pytest.raises(JobError, match="was not started: the run was interrupted"):
        executor.run_isolated(functions.own_pid)


def test_a_job_alone_gets_all_cores_and_beside_others_its_share(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    executor = LocalExecutor.of(4)
    threads = "OMP_NUM_THREADS"
    assert executor.run_isolated(functions.variable, name=threads) == "8"
    assert executor.shared_by(2).run_isolated(functions.variable, name=threads) == "4"
    assert executor.shared_by(9).run_isolated(functions.variable, name=threads) == "2"


def test_numbers_of_threads_by_level_are_left_to_openmp(executor, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # such a job's numbers are the user's
    monkeypatch.setattr("tclora.jobs.devices._LEASES", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert executor.run_isolated(functions.variable, name="OMP_NUM_THREADS") == "2,1"


def test_a_job_dies_with_its_parent(tmp_path):
    """A parent that is killed can only be noticed by its closed pipe."""
    spec = tmp_path / "call.json"
    spec.write_text(Call.of(functions.endless, {}).model_dump_json())
    command = [sys.executable, "-m", "tclora.jobs.worker", str(spec)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert b"pid" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(timeout=30) == 1
