"""Clusters of Dask and Ray for tests: started apart, watched, with a worker that is killed."""

import importlib.util
import json
import re
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tasks.dask_tasks import dask_tasks
from tasks.ray_tasks import ray_tasks
from tclora.library.manifest import read_manifest
from tests.flows.sent import executor_of, run_job
from tests.jobs.running import running_jobs, starter_of

CONNECT = {"dask": dask_tasks, "ray": ray_tasks}
MODULES = {"dask": "distributed", "ray": "ray"}


def needing(backend):
    """Skip without the extra: `make test` installs that of Dask, not Ray's 260 MB."""
    missing = importlib.util.find_spec(MODULES[backend]) is None
    why = f"pip install tclora[{backend}]; `make test` leaves out Ray, which takes 260 MB"
    return pytest.param(backend, marks=pytest.mark.skipif(missing, reason=why))


class Killer(threading.Thread):
    """Notes the jobs' processes; kills the worker of a training when another one is finished.

    Parameters
    ----------
    cache : Path
        Where workers work.
    store : Path
        Of the run.
    """

    def __init__(self, cache, store):
        super().__init__(daemon=True)
        self.workspaces, self.store = cache / "jobs", store
        self.processes = {}  # pid → key of its job
        self.killed = self.finished = None
        self.ended = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()

    def run(self):
        while not self.ended.wait(0.1):
            for spec, process in running_jobs().items():
                with suppress(psutil.Error, OSError, ValueError):
                    self.see(spec, process)

    def see(self, spec, process):
        if process.pid not in self.processes:
            call = json.loads(spec.read_text())
            pattern = rf"{re.escape(str(self.workspaces))}/([0-9a-f]{{64}})/"
            self.processes[process.pid] = re.search(pattern, json.dumps(call))[1]
        key = self.processes[process.pid]
        delivered = {path.parent.name for path in self.store.glob("jobs/*/delivery.json")}
        if not self.killed and delivered - {key} and self.is_training(key):
            starter_of(process.pid).kill()
            self.killed, self.finished = key, delivered

    def is_training(self, key):
        return bool(list((self.workspaces / key).glob("*/cluster-*-*/*")))


def assert_same_library(root, other):
    """Compare every file by its digest, but for what differs between two runs of this machine."""
    found, expected = read_manifest(root).digests, read_manifest(other).digests
    assert found.keys() == expected.keys()
    logs = {name for name in found if name.startswith("training/")}  # they hold tokens per second
    apart = {name for name in found if found[name] != expected[name]} - logs
    assert apart <= {"factors.safetensors"}  # of this process, with as many threads as are free
    ours, theirs = (load_file(folder / "factors.safetensors") for folder in (root, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
    for name in logs:
        assert losses(root / name) == losses(other / name)


def losses(log):
    return [(record["step"], record["loss"]) for record in json.loads(log.read_text())]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def dask_commands(port):
    cli = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}"]
    worker = [*cli, "--host=127.0.0.1", "--nthreads=1", "--no-dashboard", "--resources=GPU=1"]
    scheduler = [
        sys.executable, "-m", "distributed.cli.dask_scheduler",
        "--host=127.0.0.1", f"--port={port}", "--no-dashboard", "--no-show",
    ]  # fmt: skip
    return [scheduler, worker, worker], f"127.0.0.1:{port}"


def ray_commands(port):
    start = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--port={port}", "--num-cpus=2", "--include-dashboard=false",
        f"--object-store-memory={100 * 2**20}",
    ]  # fmt: skip
    return [start], f"127.0.0.1:{port}"


COMMANDS = {"dask": dask_commands, "ray": ray_commands}


@dataclass(frozen=True)
class Apart:
    backend: str
    address: str
    home: Path

    @property
    def store(self):
        return f"file://{self.home.parent / 'store'}-{self.backend}"


def answers(address):
    host, port = address.split(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def await_workers(address, count):
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=60)


def send_endless(backend, address, store, folder):
    def tell(event):
        print("pid", event["pid"], flush=True)  # noqa: T201

    with CONNECT[backend](address, "auto", 1) as fleet:
        run_job(executor_of(store, folder, fleet), "endless", tell)
