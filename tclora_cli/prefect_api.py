"""What `tclora up` asks of a Prefect server; its own client takes seconds to import."""

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tclora.errors import ConfigError

_WORKER = "prefect.worker.name"  # label of a run that a worker has taken
_BUSY = (1, 2, 4, 8, 16)  # s between attempts at a server whose database is busy


def ensure_pool(api: str, pool: str, template: Path, limit: int | None) -> None:
    """Make a process pool that is not there; one that is keeps its template.

    Parameters
    ----------
    api : str
        Address of the server's API.
    pool : str
        Its name.
    template : Path
        Base job template of a new one, JSON.
    limit : int or None
        Jobs at once; None leaves it as it is.
    """
    place = f"{api}/work_pools/{pool}"
    try:
        ask(place)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        job = json.loads(template.read_text(encoding="utf-8"))
        ask(f"{api}/work_pools/", {"name": pool, "type": "process", "base_job_template": job})
    if limit is not None:
        ask(place, {"concurrency_limit": limit}, "PATCH")


def is_online(api: str, pool: str, worker: str) -> bool:
    """Return whether a worker of a pool has reported lately.

    Raises
    ------
    ConfigError
        If the server wants another login.
    """
    try:
        workers = ask(f"{api}/work_pools/{pool}/workers/filter", {})
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            raise ConfigError(
                "PREFECT_API_AUTH_STRING must be set to the USER:PASSWORD that the Prefect server "
                f"{api} was started with, which refuses to tell of its workers"
            ) from None
        return False
    except OSError:
        return False
    return any(w["name"] == worker and w["status"] == "ONLINE" for w in workers)


def end_lost_runs(
    api: str, workers: Mapping[str, tuple[str, bool]], living: Callable[[], Collection[str]]
) -> int:
    """Say of runs that a machine's workers have taken, and their subflows, that their process went.

    Runs of workers elsewhere, and of pools that are not of processes, are left alone.

    Parameters
    ----------
    api : str
        Address of the server's API.
    workers : mapping of str to (str, bool)
        Pool → name of its worker on this machine, and whether that works; if not, runs that were
        about to start are lost too.
    living : callable
        Returns the ids of flow runs that have a process now.

    Returns
    -------
    int
        How many there were, subflows not counted.
    """
    found = []
    for pool, (worker, works) in workers.items():
        if ask(f"{api}/work_pools/{pool}")["type"] == "process":
            states = ["RUNNING"] if works else ["RUNNING", "PENDING"]
            taken = _active(api, states, {"work_pools": {"name": {"any_": [pool]}}})
            found += [run["id"] for run in taken if run["labels"].get(_WORKER) == worker]
    alive = living()  # after that, or one that began between would seem lost
    lost = [run for run in found if run not in alive]
    family = list(lost)
    for parent in family:  # grows
        wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [parent]}}}
        below = _active(api, ["RUNNING", "PENDING"], wanted)
        family += [run["id"] for run in below if run["deployment_id"] is None]
    state = {"type": "CRASHED", "name": "Crashed", "message": "its process has ended"}
    for run in family:  # not by force: one that has ended meanwhile stays as it is
        ask(f"{api}/flow_runs/{run}/set_state", {"state": state})
    return len(lost)


def _active(api: str, states: list[str], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    state = {"state": {"type": {"any_": states}}}
    runs = {**wanted.get("flow_runs", {}), **state}
    found: list[dict[str, Any]] = ask(f"{api}/flow_runs/filter", {**wanted, "flow_runs": runs})
    return found


def ask(url: str, body: Any = None, method: str | None = None) -> Any:  # noqa: ANN401
    """Ask the Prefect server; what is sent and what comes back is JSON."""
    headers = {"Content-Type": "application/json"}
    if given := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(given.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310
    for pause in (*_BUSY, 0):
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                text = response.read()
            break
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or not pause:
                raise
            time.sleep(pause)
    return json.loads(text) if text else None
