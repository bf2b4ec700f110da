"""A job that sleeps and writes, and the stage that sends it; a plugin of the workers."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.artifact import Artifact
from tasks.keys import stage
from tasks.where import Where


@dataclass(frozen=True)
class Worked:
    """When a job's function began and ended (s since 1970)."""

    begin: float
    end: float


def work(*, name: str, seconds: float, megabytes: int, target: Path) -> Worked:
    """Sleep, and write a file that no other job writes."""
    begin = time.time()
    time.sleep(seconds)
    draw = random.Random(name)
    with target.open("wb") as file:
        for _ in range(megabytes):
            file.write(draw.randbytes(10**6))
    return Worked(begin, time.time())


@stage("simulate", "simulate-{name}")
def simulate(name: str, seconds: float, megabytes: int, where: Where) -> Artifact:
    """Run one job elsewhere."""
    target = where.layout.root / name
    done = where.executor.run_isolated(
        work, name=name, seconds=seconds, megabytes=megabytes, target=target
    )
    info = {"begin": done.begin, "end": done.end}
    return Artifact.of(where.layout.root, target, info=info)
