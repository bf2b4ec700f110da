"""A job that sleeps and writes; a plugin of the workers."""

import random
import time
from dataclasses import dataclass
from pathlib import Path


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
