"""How many jobs run at once, which GPU each of them leases, and locks between processes.

Locks are the kernel's, so they are returned when their holder dies, and independent runs on one
machine share the GPUs without knowing of each other.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tclora.errors import JobError

_POLL_SECONDS = 0.5
# The same for all users and processes of a machine, whatever their own temporary folders are.
_LEASES = Path("/tmp" if os.name == "posix" else tempfile.gettempdir()) / "tclora-gpu-leases"  # noqa: S108
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in {"", "-1"}]
    import torch

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


def job_environment(jobs: int, gpus: Sequence[str] = ()) -> dict[str, str]:
    """Environment of one of `jobs` concurrent jobs: its GPUs, or its share of the cores."""
    common = {"TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        return common | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # All of them: a Dask worker has set each to 1 for what it runs.
    return common | dict.fromkeys(THREADS, str(threads))


@contextmanager
def lease_gpus(
    gpus: list[str],
    count: int = 1,
    folder: Path | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[list[str]]:
    """Hold some of the GPUs for the duration of a block; wait until they are free.

    Parameters
    ----------
    gpus : list of str
        Ids to choose from; none on a machine without.
    count : int
        How many; those that want several gather them one after the other, so that all come to it.
    folder : Path, optional
        Where the lock files live; shared by all runs that must not collide.
    stopped : Event, optional
        Ends the wait when it is set.

    Yields
    ------
    list of str
        The ids of the leased GPUs; none on a machine without.

    Raises
    ------
    JobError
        If there are fewer, or the wait was ended.
    """
    if not gpus:
        yield []
        return
    if count > len(gpus):
        raise JobError(
            f"a job of train.data_parallel={count} must have {count} GPUs, this machine has "
            f"{len(gpus)}; lower it"
        )
    folder = folder or _LEASES
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):  # another user's, and then open to all
        folder.chmod(0o1777)
    stopped = stopped or threading.Event()
    with ExitStack() as held:
        taken = _gathered(gpus, count, folder, stopped, held)
        if len(taken) < count:
            raise JobError("a GPU was waited for when the run was interrupted")
        yield taken


def _gathered(
    gpus: list[str], count: int, folder: Path, stopped: threading.Event, held: ExitStack
) -> list[str]:
    """Return leased GPUs, fewer than wanted if the wait was ended; `held` gives them back."""
    taken: list[str] = []
    with ExitStack() as queue:
        # Who gathers several keeps others who would from the same ones; in the same order for all.
        for gpu in sorted(gpus) if count > 1 else ():
            while not _locked(folder / f"several-gpu{gpu}.lock", queue):
                if stopped.wait(_POLL_SECONDS):
                    return taken
        while not stopped.is_set():
            for gpu in gpus:
                wanted = len(taken) < count and gpu not in taken
                if wanted and _locked(folder / f"gpu{gpu}.lock", held):
                    taken.append(gpu)
            if len(taken) == count:
                break
            stopped.wait(_POLL_SECONDS)
    return taken


def _locked(place: Path, held: ExitStack) -> bool:
    """Take a lock that is free until a stack is left."""
    lock = FileLock(place, timeout=0, mode=0o666, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    held.callback(lock.release)
    return True


@contextmanager
def exclusive(
    path: Path, on_wait: Callable[[Mapping[str, float]], None] | None = None
) -> Iterator[None]:
    """Hold a lock file; wait for whoever holds it.

    Parameters
    ----------
    path : Path
        The lock file; a note beside it says who holds it.
    on_wait : callable, optional
        Called once before waiting, with the holder's ``pid`` and how long it has had the lock
        (``seconds``), as far as its note says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_name(f"{path.name}.holder")
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait:
            on_wait(_holder(note))
        lock.acquire()
    try:
        note.write_text(json.dumps({"pid": os.getpid(), "since": time.time()}), encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> dict[str, float]:
    try:
        written = json.loads(note.read_text(encoding="utf-8"))
        return {"pid": written["pid"], "seconds": time.time() - written["since"]}
    except (OSError, ValueError, KeyError):  # it has just been taken, or just been given back
        return {}
