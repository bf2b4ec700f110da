"""How many jobs run at once, and which GPU each of them leases.

A lease is an ``flock`` on a file per GPU, so the kernel returns it when its holder dies, and
independent runs on one machine share the GPUs without knowing of each other.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_POLL_SECONDS = 0.5


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in {"", "-1"}]
    return [str(i) for i in range(torch.cuda.device_count())]


def parallel_jobs(configured: int | str) -> int:
    """Jobs at once: as configured, else one per GPU, else one per core, at most eight.

    Parameters
    ----------
    configured : int or "auto"
        ``resources.jobs``.
    """
    if configured != "auto":
        return int(configured)
    return len(visible_gpus()) or min(8, os.cpu_count() or 1)


def job_environment(jobs: int) -> dict[str, str]:
    """Environment of one of `jobs` concurrent CPU jobs: its share of the cores, no telemetry."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def lease_gpu(gpus: list[str], folder: Path | None = None) -> Iterator[str | None]:
    """Hold one of the GPUs for the duration of a block; wait until one is free.

    Parameters
    ----------
    gpus : list of str
        Ids to choose from; none on a machine without.
    folder : Path, optional
        Where the lock files live; shared by all runs that must not collide.

    Yields
    ------
    str or None
        The id of the leased GPU.
    """
    if not gpus:
        yield None
        return
    folder = folder or Path(tempfile.gettempdir()) / "tclora-gpu-leases"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for gpu in gpus:
            with (folder / f"gpu{gpu}.lock").open("w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield gpu
                return
        time.sleep(_POLL_SECONDS)


@contextmanager
def exclusive(path: Path) -> Iterator[float]:
    """Hold an exclusive lock file; wait for whoever holds it.

    Yields
    ------
    float
        How long it took to get it (s).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield time.monotonic() - started
