"""Where jobs are to run and the library is to be put: whether packages and places are there."""

import importlib.util
import socket

from tclora.config import Config
from tclora.errors import ConfigError, StoreError
from tclora.jobs.devices import visible_gpus
from tclora.store.objects import Store

_PACKAGES = {"ray": "ray", "dask": "distributed"}
_TIMEOUT = 5.0  # s
_PAUSES = (0.5, 1.0, 2.0)  # s between attempts at a store


def execution_problems(config: Config) -> list[str]:
    """Find missing packages and GPUs, a cluster that does not answer, a store that is closed."""
    execution, problems = config.execution, []
    backend, address = execution.backend, execution.address
    package = _PACKAGES.get(backend)
    if package and importlib.util.find_spec(package) is None:
        problems.append(
            f"execution.backend: {backend!r} needs {package}: pip install tclora[{backend}]"
        )
    if address and (error := _refusal(address)):
        problems.append(
            f"execution.{backend}_address must be reachable from here, got {address!r} "
            f"({error}); start the cluster, correct the address, or leave it out for a cluster of "
            "the run's own"
        )
    team, gpus = config.train.data_parallel, len(visible_gpus()) if execution.workers_here else 0
    if gpus and team > gpus:
        problems.append(
            f"train.data_parallel must be at most the number of GPUs, got {team}, "
            f"{gpus} are visible; lower it"
        )
    for field, url in (("publish_to", config.publish_to), ("execution.store", execution.store)):
        try:
            if url:
                Store(url, _PAUSES).check()
        except (ConfigError, StoreError) as error:
            problems.append(f"{field}: {error}")
    return problems


def _refusal(address: str) -> OSError | None:
    """Return why nobody answers at an address."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT):
            return None
    except OSError as error:
        return error
