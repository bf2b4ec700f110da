"""Workers with places of their own, as on other machines: nothing is shared but servers and store.

Each has a home, a temporary folder and a cache; where this runs as root, the folders of the run and
of the other hosts are hidden from it by mounts of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fleet import Fleet

from tclora_cli.processes import start
from tclora_cli.services import JOBS

_HIDDEN = 'while [ "$1" != -- ]; do mount -t tmpfs none "$1"; shift; done; shift; exec "$@"'


@contextmanager
def hosts(site: Fleet, count: int) -> Iterator[list[Path]]:
    """Put so many hosts, each with one job at once, in the place of the fleet's worker of jobs.

    Yields
    ------
    list of Path
        Their folders.
    """
    site.started(f"worker of {JOBS}").end()
    homes = [site.machine.folder.with_name(f"host-{number}") for number in range(count)]
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        (home / "tmp").mkdir(parents=True)
    try:
        with ExitStack() as stack:
            for home in homes:
                stack.enter_context(_host(site, home, [other for other in homes if other != home]))
            yield homes
    finally:
        site.heal()  # the fleet's own worker is there again


def jobs_done(home: Path) -> int:
    """Return how many jobs a host has done."""
    return len(list((home / "cache" / "jobs").glob("*.lock")))


def run_by_command(site: Fleet, deployment: str, config: dict[str, Any]) -> None:
    """Run ``prefect deployment run`` to its end."""
    command = ["prefect", "deployment", "run", deployment, "--watch"]
    given = ["--param", f"config={json.dumps(config)}"]
    environment = os.environ | site.machine.environment
    subprocess.run([sys.executable, "-m", *command, *given], env=environment, check=True)


@contextmanager
def _host(site: Fleet, home: Path, others: list[Path]) -> Iterator[None]:
    own = {
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "TCLORA_CACHE": str(home / "cache"),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_API_URL": site.machine.environment["PREFECT_API_URL"],
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
    command += ["--pool", JOBS, "--limit", "1", "--name", home.name]
    if os.geteuid() == 0:
        hidden = [site.machine.root, Path(os.environ["TCLORA_CACHE"]), *others]
        inside = ["sh", "-ec", _HIDDEN, "sh", *map(str, hidden), "--", *command]
        command = ["/usr/bin/unshare", "--mount", *inside]
    started = start(command, own, home, home / "log")
    try:
        yield
    finally:
        started.end()
