"""``tclora up``, ``down``, ``status``: the servers, pools and workers of one machine, on loopback.

Everything they keep is in one folder, so that stopping and starting again, also of the machine,
loses nothing. Databases elsewhere are named in the environment as the servers read it
(``PREFECT_SERVER_DATABASE_CONNECTION_URL``, ``MLFLOW_BACKEND_STORE_URI``), and so is who may log in
(``PREFECT_SERVER_API_AUTH_STRING``, ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``):
no command line holds a password.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import flows
from tclora.errors import ConfigError, JobError
from tclora.jobs.devices import exclusive
from tclora_cli import logins
from tclora_cli.prefect_api import end_lost_runs, ensure_pool
from tclora_cli.processes import Ledger, Started, flow_runs_here, last_lines, start, wait_until
from tclora_cli.services import JOBS, POOLS, Machine, Service, worker_name

_LIMIT = 180.0  # s that a service has to become healthy
_DATABASES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "MLFLOW_BACKEND_STORE_URI")


def up(machine: Machine, say: Callable[[str], None]) -> None:
    """Start what does not run yet, and wait until each part is healthy.

    Raises
    ------
    ConfigError
        If a port is taken by another process, a database or login that the machine was started
        with is not named any more, or a server is more or less open than the environment says.
    JobError
        If a part does not become healthy, nor when it is started anew; others that were started go
        on, for `down` or another `up`.
    """
    machine.folder.mkdir(parents=True, exist_ok=True)
    machine.root.mkdir(parents=True, exist_ok=True)
    with exclusive(machine.folder / "machine.lock"):
        _check_databases(machine)
        logins.check_named(Ledger.read(machine.ledger).settings, machine.folder)
        services = machine.services(logins.mlflow_settings(machine.folder))
        servers, workers = services[:2], services[2:]
        for service in servers:
            _end_survivors(machine, service)
            _check_port(machine, service)
        _ensure(machine, servers, say)
        logins.check_servers(machine.prefect, machine.mlflow)
        _remember(machine, logins.remembered())
        _prepare(machine, say)
        _end_lost_runs(machine, say)
        _ensure(machine, workers, say)


def down(machine: Machine, say: Callable[[str], None]) -> None:
    """Stop what `up` has started, the last first; state stays."""
    with exclusive(machine.folder / "machine.lock"):
        ledger = Ledger.read(machine.ledger)
        for name in reversed(list(ledger.started)):
            ended = ledger.started.pop(name).end()
            ledger.write(machine.ledger)
            say(f"{name:<20}{'stopped' if ended else 'was not running'}")


def status(machine: Machine) -> dict[str, tuple[str, str]]:
    """Return the state of every part, healthy, unhealthy or stopped, and where it is."""
    ledger = Ledger.read(machine.ledger)
    found = {}
    for service in machine.services():
        if ledger.runs(service.name):
            state = "healthy" if service.healthy() else "unhealthy"
        else:
            state = "stopped"
        place = f"http://127.0.0.1:{service.port}" if service.port else ""
        found[service.name] = (state, place)
    return found


def _ensure(machine: Machine, services: Sequence[Service], say: Callable[[str], None]) -> None:
    """Start services beside each other, and wait for each; one that hangs is started anew."""
    until = time.monotonic() + _LIMIT
    for service, started in [(service, _started(machine, service)) for service in services]:
        if not wait_until(service.healthy, started, until):
            started.end()
            _start_anew(machine, service)
        say(f"{service.name:<20}healthy")


def _started(machine: Machine, service: Service) -> Started:
    """Return the process of a service: the one that runs, or a new one."""
    ledger = Ledger.read(machine.ledger)
    started = ledger.started.get(service.name)
    if started is None or started.process is None:
        started = start(service.command, service.environment, machine.root, _log(machine, service))
        ledger.started[service.name] = started
        ledger.settings |= _settings(machine)
        ledger.write(machine.ledger)
    return started


def _start_anew(machine: Machine, service: Service) -> None:
    started = _started(machine, service)
    if wait_until(service.healthy, started, time.monotonic() + _LIMIT):
        return
    started.end()
    log = _log(machine, service)
    raise JobError(
        f"{service.name} must become healthy within {_LIMIT:.0f} s, but did not; see {log}, "
        f"which ends with:\n{last_lines(log)}"
    )


def _remember(machine: Machine, settings: Mapping[str, str]) -> None:
    ledger = Ledger.read(machine.ledger)
    ledger.settings |= settings
    ledger.write(machine.ledger)


def _settings(machine: Machine) -> dict[str, str]:
    return {
        "root": str(machine.root),
        "jobs": str(machine.jobs),
        "prefect_port": str(machine.prefect_port),
        "mlflow_port": str(machine.mlflow_port),
        "databases": " ".join(name for name in _DATABASES if os.environ.get(name)),
    }


def _check_databases(machine: Machine) -> None:
    """Refuse to start with files in place of databases: all runs would seem to be lost."""
    before = Ledger.read(machine.ledger).settings.get("databases", "").split()
    if missing := [name for name in before if not os.environ.get(name)]:
        raise ConfigError(
            f"{' and '.join(missing)} must be set as when this machine was started, since its runs "
            f"are in that database; set it, or name another --folder than {machine.folder}"
        )


def _end_survivors(machine: Machine, service: Service) -> None:
    """End what a server that was killed has left behind, which may hold its port."""
    started = Ledger.read(machine.ledger).started.get(service.name)
    if started and started.process is None:
        started.end()


def _check_port(machine: Machine, service: Service) -> None:
    started = Ledger.read(machine.ledger).started.get(service.name)
    if started and started.process:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", service.port or 0))
        except OSError:
            raise ConfigError(
                f"port {service.port} of 127.0.0.1 must be free for {service.name}, but another "
                f"process has it; name another one with --{service.name}-port"
            ) from None


def _prepare(machine: Machine, say: Callable[[str], None]) -> None:
    """Make the pools with their limits, and deploy."""
    here = Path(flows.__file__).parents[1] / "deployments"
    if not (here / "prefect.yaml").is_file():
        raise ConfigError(
            f"deployments must be in {here}, but there are none; run `tclora up` of a checkout of "
            "the repository (pip install --editable)"
        )
    for pool in POOLS:
        limit = machine.jobs if pool == JOBS else None
        ensure_pool(f"{machine.prefect}/api", pool, here / "pools" / "process.json", limit)
    command = ["deploy", "--all", "--prefect-file", str(here / "prefect.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        env=os.environ | machine.environment,
        cwd=machine.root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()[-500:]
        raise JobError(f"prefect deploy must succeed, but: {reason}")
    say(f"{'pools, deployments':<20}ready")


def _end_lost_runs(machine: Machine, say: Callable[[str], None]) -> None:
    ledger = Ledger.read(machine.ledger)
    workers = {pool: (worker_name(pool), ledger.runs(f"worker of {pool}")) for pool in POOLS}
    try:
        lost = end_lost_runs(f"{machine.prefect}/api", workers, flow_runs_here)
    except OSError as error:  # workers are worth more than what Prefect shows of former runs
        say(f"{'lost runs':<20}not ended: {error}")
    else:
        if lost:
            say(f"{'lost runs':<20}{lost} ended")


def _log(machine: Machine, service: Service) -> Path:
    return machine.folder / "logs" / f"{service.name.replace(' ', '-')}.log"
