"""Samples of what processes use: this one, and a job's own."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tclora.errors import JobError
from tclora.jobs.run import LocalExecutor
from tclora.jobs.usage import Sampling
from tests.jobs import functions

NAMES = {
    "cpu_utilization_percentage", "system_memory_usage_megabytes",
    "system_memory_usage_percentage", "process_cpu_utilization_percentage",
    "process_memory_usage_megabytes",
}  # fmt: skip


def busy(samples, count):
    end = time.monotonic() + 60
    while len(samples) < count and time.monotonic() < end:
        pass


def test_a_block_is_sampled_now_and_then_and_at_its_end():
    samples = []
    with Sampling(samples.append, pause=0.2):
        busy(samples, 2)
    assert len(samples) >= 3
    assert {sample.host for sample in samples} == {socket.gethostname()}
    assert all(set(sample.used) >= NAMES for sample in samples)
    assert max(sample.used["process_cpu_utilization_percentage"] for sample in samples) > 20
    used = psutil.Process(os.getpid()).memory_info().rss / 1e6
    assert samples[-1].used["process_memory_usage_megabytes"] == pytest.approx(used, rel=0.2)


def test_processes_that_were_started_count_where_they_are_asked_for():
    script = "import time\nheld = bytearray(200_000_000)\nprint(flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", script]
    found = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        for family in (False, True):
            samples = []
            with Sampling(samples.append, pause=60, family=family):
                pass
            found[family] = samples[-1].used["process_memory_usage_megabytes"]
        child.kill()
    assert found[True] > found[False] + 150


def test_a_job_tells_what_its_own_process_uses():
    samples = []
    executor = LocalExecutor().watched_by(lambda job, sample: samples.append((job, sample)))
    assert executor.run_isolated(functions.variable, name="HOME") == os.environ["HOME"]
    ((job, sample),) = samples
    assert job == "variable HOME"
    assert sample.host == socket.gethostname()
    used = sample.used
    assert 0 < used["process_memory_usage_megabytes"] < used["system_memory_usage_megabytes"]


def test_a_job_that_fails_has_told_too():
    samples = []
    executor = LocalExecutor().watched_by(lambda job, sample: samples.append(job))
    with pytest.raises(JobError, match="loss became nan"):
        executor.run_isolated(functions.fail, name="one")
    assert samples == ["fail one"]
