"""What it takes to start a job: forked from a process with the imports, and from nothing.

Usage: ``python benchmarks/job_start.py [ROUNDS]``. The job does nothing; its module imports what
trainings and evaluations do.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tables import report

import tclora.evaluate.method
import tclora.train.engines  # noqa: F401
from tclora.jobs.call import Call
from tclora.jobs.devices import job_environment
from tclora.jobs.processes import start_process


def idle() -> int:
    """Return the processor time that this process has used (ms)."""
    return round(time.process_time() * 1000)


def started(folder: Path, *, fresh: bool) -> tuple[float, float]:
    """Return the time of one job from its start to its end, and its processor time (s)."""
    from job_start import idle as job  # by the name that a job can import

    call = Call.of(job, {})
    spec = folder / "call.json"
    spec.write_text(call.model_dump_json(), encoding="utf-8")
    begin = time.monotonic()
    with (folder / "stderr").open("wb") as errors:
        process = start_process(
            spec, call.module, job_environment(1), errors, gpus=fresh, stopped=threading.Event()
        )
    said = process.stdout.read().splitlines() if process.stdout else []
    if process.wait() != 0:
        raise RuntimeError((folder / "stderr").read_text())
    seconds = time.monotonic() - begin
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    return seconds, int(said[-1].rpartition(":")[2].rstrip("}")) / 1000


def main(rounds: int) -> None:
    """Take turns, and report the medians."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found: dict[str, list[tuple[float, float]]] = {"forked": [], "from nothing": []}
    with tempfile.TemporaryDirectory() as folder:
        first = started(Path(folder), fresh=False)
        for _ in range(rounds):
            for way, times in found.items():
                times.append(started(Path(folder), fresh=way != "forked"))
    columns = ["start to end (s)", "its processor time (s)"]
    frame = pd.DataFrame(
        {way: np.median(times, axis=0) for way, times in found.items()}, index=columns
    ).T.reset_index(names="way")
    frame["of the time from nothing"] = frame[columns[0]] / frame[columns[0]].iloc[-1]
    report(
        "job_start",
        "The start of a job that does nothing",
        frame,
        f"Medians of {rounds} in turns; all imports of trainings and evaluations are the module's. "
        f"The first forked one, which waits for the imports, took {first[0]:.1f} s.",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
