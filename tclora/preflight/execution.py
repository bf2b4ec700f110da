"""Where jobs are to run: whether the package is installed, and whether anyone answers there."""

import importlib.util
import socket

from tclora.config import Config

_PACKAGES = {"ray": "ray", "dask": "distributed"}
_TIMEOUT = 5.0  # s


def execution_problems(config: Config) -> list[str]:
    """Find a back end whose package is missing, or whose cluster does not answer."""
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
    return problems


def _refusal(address: str) -> OSError | None:
    """Return why nobody answers at an address."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT):
            return None
    except OSError as error:
        return error
