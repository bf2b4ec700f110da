"""Processes that train together: what they share, and how they end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from tclora.errors import JobError, ModelError
from tclora.train.team import Team, run_team

pytestmark = pytest.mark.timeout(300)  # each process imports torch
LENGTHS = [5, 90, 7, 40, 41, 3, 60, 8]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_are_shared_evenly_and_stay_in_their_order(size):
    parts = [Team(rank, size).share(range(len(LENGTHS)), LENGTHS) for rank in range(size)]
    assert sorted(row for part in parts for row in part) == list(range(len(LENGTHS)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(LENGTHS[row] for row in part) for part in parts]
    assert max(loads) - min(loads) <= 15


def test_more_processes_than_rows():
    assert [Team(rank, 3).share("ab", [1, 2]) for rank in range(3)] == [["b"], ["a"], []]


def test_alone_nothing_is_changed():
    values = torch.tensor([1.0, 2.0])
    Team().add_up([values])
    assert values.tolist() == [1, 2]
    assert Team().sums([1, 2.5]) == [1, 2.5]


def add(team, on_event, start, *, halves):
    """Add up numbers of the processes, one of them in bf16."""
    values = torch.full((2, 3), start + team.rank)
    small = torch.tensor([1.0, 0.5], dtype=torch.bfloat16) * (team.rank + 1)
    team.add_up([values, small])
    on_event({"rank": team.rank})
    return values.tolist(), small.tolist(), team.sums([halves, team.rank])


def test_sums_are_over_all_processes():
    events = []
    values, small, sums = run_team(2, add, events.append, 10.0, halves=0.5)
    assert values == [[21.0] * 3] * 2
    assert small == [3.0, 1.5]
    assert sums == [1.0, 1.0]
    assert events == [{"rank": 0}]


def refuse(team, on_event):
    """Raise in the second process, while the first waits for it."""
    if team.rank == 1:
        raise ModelError("rows must fit")
    team.sums([1.0])


def lack(team, on_event):
    """Fail in the second process, as where a disk is full."""
    if team.rank == 1:
        raise OSError(28, "No space left on device")
    team.sums([1.0])


def fall(team, on_event):
    """Be killed in the second process, while the first waits for it."""
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def is_of_a_team(process):
    """Whether a process runs that trains together with others: one that has ended does not."""
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (refuse, ModelError, "^rows must fit$"),
        (lack, JobError, "^OSError: .* No space left on device"),
        (fall, JobError, r"one of 2 processes that train together died: .* SIGKILL"),
    ],
)
def test_the_end_of_one_is_the_end_of_all(function, error, message):
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        run_team(2, function, lambda _: None)
    assert time.monotonic() - begin < 50
    assert not any(map(is_of_a_team, psutil.Process().children()))


def tell(team, on_event):
    """Say who is there, and stay."""
    on_event({"pids": [int(pid) for pid in team.sums([os.getpid() * (team.rank == r)
                                                      for r in range(team.size)])]})  # fmt: skip
    time.sleep(250)


def test_processes_end_with_the_one_that_started_them():
    script = (
        "from tclora.train.team import run_team\n"
        "from tests.train.test_team import tell\n"
        "if __name__ == '__main__':\n"
        "    run_team(2, tell, lambda event: print(*event['pids'], flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        found = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(found) == 2
        parent.kill()
    _, alive = psutil.wait_procs(found, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
