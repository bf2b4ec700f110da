"""The processes of jobs, however they were started: their standard error is in the job's folder."""

from contextlib import suppress
from pathlib import Path

import psutil


def running_jobs(process=None):
    """Return the jobs below a process, by the file of their call."""
    found = {}
    for child in (process or psutil.Process()).children(recursive=True):
        with suppress(OSError):  # it has ended
            errors = Path(f"/proc/{child.pid}/fd/2").readlink()
            if errors.parent.name.startswith("tclora-job-"):
                found[errors.with_name("call.json")] = child
    return found


def starter_of(pid):
    """Return the process that has started a job, by itself or through its fork server."""
    parent = psutil.Process(pid).parent()
    return parent.parent() if "tclora.jobs.fork_server" in parent.cmdline() else parent
