"""What it takes to start a job: forked from a process with the imports, and from nothing.

Usage: ``python benchmarks/job_start.py [ROUNDS]``. The job does nothing; its module imports what
trainings do.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import pandas as pd
from tables import report

from tclora.config import AdapterConfig
from tclora.jobs.call import Call
from tclora.jobs.devices import job_environment
from tclora.jobs.processes import Limits, start_process
from tclora.train.course import total_steps


def started(folder: Path, *, fresh: bool) -> float:
    """Return the time of one job from its start to its end (s)."""
    call = Call.of(total_steps, {"n_rows": 8, "config": AdapterConfig()})
    spec = folder / "call.json"
    spec.write_text(call.model_dump_json(), encoding="utf-8")
    begin, limits = time.monotonic(), Limits(threading.Event())
    with (folder / "stderr").open("wb") as errors:
        process = start_process(spec, call.module, job_environment(1), errors, limits, gpus=fresh)
    said = process.stdout.read() if process.stdout else ""
    if process.wait() != 0 or "result" not in said:
        raise RuntimeError((folder / "stderr").read_text())
    seconds = time.monotonic() - begin
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    return seconds


def main(rounds: int) -> None:
    """Take turns, and report the medians."""
    found: dict[str, list[float]] = {"forked": [], "from nothing": []}
    with tempfile.TemporaryDirectory() as folder:
        first = started(Path(folder), fresh=False)
        for _ in range(rounds):
            for way, times in found.items():
                times.append(started(Path(folder), fresh=way != "forked"))
    frame = pd.DataFrame({"way": list(found), "s": [median(times) for times in found.values()]})
    frame["of the time from nothing"] = frame["s"] / frame["s"].iloc[-1]
    report(
        "job_start",
        "The start of a job that does nothing",
        frame,
        f"From start to end, medians of {rounds} in turns; all imports of a training are the "
        f"module's. The first forked one, which waits for the imports, took {first:.1f} s.",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
