"""Attempts at jobs as Ray tasks, on a cluster that is there or one of this run's own.

Plain tasks through Ray's own client: what travels is the name of a job. Ray makes an attempt once
and says when its worker is lost; another attempt is the executor's to make (`tasks.remote`).
"""

import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tasks.attempts import do_job
from tasks.fleet import Ending, Fate, SentJob, Sign, gpus_asked
from tclora.errors import ConfigError
from tclora.jobs.devices import visible_gpus

_ENVIRONMENT = {
    # Ray reads it when it is imported. For what it is named after, Ray keeps to the loopback
    # interface; there is no other way to have that.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECTS = 100 * 2**20  # bytes of Ray's own object store; files travel through ours


@dataclass(frozen=True)
class RayTasks:
    """Makes each attempt as a Ray task.

    Attributes
    ----------
    gpus : int
        Whether a job asks for its GPUs, 1 or 0; Ray shows its worker no others.
    name : str
        What messages call it.
    """

    gpus: int
    name: str = "Ray"

    @contextmanager
    def attempt(self, job: SentJob) -> Iterator["_Attempt"]:
        """Send a job."""
        import ray

        # `do_job` waits for a process of its own, which leases the GPU that Ray has given.
        options = {"num_cpus": 1, "max_retries": 0, "name": job.name}
        options["num_gpus"] = self.gpus * job.gpus
        name = uuid.uuid4().hex
        given = job.records.store.url, job.records.key, name
        yield _Attempt(name, job.name, ray.remote(do_job).options(**options).remote(*given))


class _Attempt:
    """A Ray task."""

    def __init__(self, name: str, job: str, reference: Any) -> None:  # noqa: ANN401
        self.name = name
        self._job = job
        self._reference = reference

    def look(self, heard: int) -> Ending | Sign:
        """Ask Ray whether the task has ended."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        done, _ = ray.wait([self._reference], timeout=0)
        if not done:
            return Sign(patience=1 if heard else float("inf"))
        try:
            failure = ray.get(self._reference)
        except TaskCancelledError:
            return Ending(Fate.CANCELLED)
        except RayTaskError as error:
            return Ending(Fate.FAILED, f"job {self._job} failed on its worker: {error.cause!r}")
        except RayError as error:
            return Ending(Fate.LOST, str(error).splitlines()[0])
        return Ending(Fate.FAILED, failure) if failure else Ending(Fate.DONE)

    def cancel(self) -> None:
        """End the task's worker, and the job with it."""
        import ray

        ray.cancel(self._reference, force=True)

    def give_up(self, message: str) -> None:
        """End the worker, if it is there."""
        self.cancel()


@contextmanager
def ray_tasks(
    address: str | None, gpus: int | str, workers: int, most: int = 1
) -> Iterator[RayTasks]:
    """Connect to a Ray cluster, or start one here that ends with the block or this process.

    Parameters
    ----------
    address : str or None
        ``"HOST:PORT"`` of a cluster that this machine is a node of, ``"ray://HOST:PORT"`` of any;
        None starts one.
    gpus : int or "auto"
        GPUs that a job asks for; "auto": one if the cluster has any.
    workers : int
        Jobs at once of a cluster of this run's own.
    most : int
        GPUs of the largest job.

    Yields
    ------
    RayTasks

    Raises
    ------
    ConfigError
        If there is no such cluster, or all its nodes have fewer GPUs than the largest job.

    Notes
    -----
    A process has one connection to Ray; where it has one already, that is used, and left alone.
    """
    own = {
        "address": "local", "num_cpus": workers, "num_gpus": len(visible_gpus()),
        "include_dashboard": False, "object_store_memory": _OBJECTS,
    }  # fmt: skip
    with _environment({} if address else _ENVIRONMENT), _own_signals():
        import ray

        connected = ray.is_initialized()
        try:
            if not connected:
                given = {"address": address} if address else own
                ray.init(**given, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"execution.ray_address must be a Ray cluster's, got {address!r}: "
                f"{str(error).splitlines()[0]}; on a machine that is none of its nodes, "
                "write ray://HOST:10001"
            ) from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        largest = max((int(node.get("GPU", 0)) for node in nodes), default=0)
        yield RayTasks(gpus_asked(gpus, largest, most, "a Ray node"))
    finally:
        if not connected:
            ray.shutdown()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does when it is ended; Ray would put a handler of its own there."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
