"""A whole machine on the loopback: started, damaged, healed, stopped."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from tclora.errors import ConfigError
from tclora_cli import machine as machines
from tclora_cli import processes
from tclora_cli.machine import down, status, up
from tclora_cli.main import app
from tclora_cli.prefect_api import ask
from tclora_cli.processes import Ledger, Started
from tclora_cli.services import Machine, Service

SLOW = """
import pathlib, sys, time
time.sleep(3)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
DYING = """
import os, pathlib, subprocess, sys, time
well, starts = map(pathlib.Path, sys.argv[1:])
again = starts.exists()
with starts.open("a") as file:
    print(os.getpid(), file=file)
    if not again:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, file=file)
well.touch()
if again:
    time.sleep(600)
"""
NAMES = ["prefect", "mlflow", "worker of run-pool", "worker of gpu-pool"]


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def bystander():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = Machine(tmp_path / "state", tmp_path / "root", 3, *free_ports(2))
    yield made
    down(made, lambda _: None)


def running_flow_runs(machine):
    """Runs in a pool that are said to run: two of its worker, a subflow, another worker's."""
    api, state = f"{machine.prefect}/api", {"state": {"type": "RUNNING"}}
    job = ask(f"{api}/deployments/name/job/job")["id"]
    workers = ask(f"{api}/work_pools/gpu-pool/workers/filter", {})
    first, second, elsewhere = (
        ask(
            f"{api}/deployments/{job}/create_flow_run",
            {
                "parameters": {"store": "file:///nowhere", "key": "a" * 64},
                "labels": {"prefect.worker.name": name},
                **state,
            },
        )["id"]
        for name in (workers[0]["name"], workers[0]["name"], "another machine's")
    )
    task = ask(f"{api}/task_runs/", {"flow_run_id": first, "task_key": "t", "dynamic_key": "0"})
    flow = ask(f"{api}/flows/", {"name": "below"})["id"]
    below = ask(f"{api}/flow_runs/", {"flow_id": flow, "parent_task_run_id": task["id"], **state})
    return first, below["id"], second, elsewhere


def running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def idle_queues(process):
    return [p for p in process.children(recursive=True) if "huey" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_comes_up_is_healed_and_goes_down_alone(machine, bystander, tmp_path):
    said = []
    up(machine, said.append)
    assert [line[:20].strip() for line in said] == [
        "prefect", "mlflow", "pools, deployments", *NAMES[2:]
    ]  # fmt: skip
    first = Ledger.read(machine.ledger).started
    assert not idle_queues(first["mlflow"].process)
    pool = ask(f"{machine.prefect}/api/work_pools/gpu-pool")
    assert pool["concurrency_limit"] == 3
    found = ask(f"{machine.prefect}/api/deployments/name/tc-lora/demo")
    assert found["enforce_parameter_schema"]
    assert ask(f"{machine.prefect}/ui-settings")["api_url"] == f"{machine.prefect}/api"
    command = ["status", "--folder", str(machine.folder)]
    assert CliRunner().invoke(app, command).exit_code == 0
    limits = f"{machine.prefect}/api/v2/concurrency_limits"
    ask(f"{limits}/", {"name": "runs", "limit": 1})
    taken = {"names": ["runs"], "slots": 1, "mode": "concurrency", "lease_duration": 600}
    lease = ask(f"{limits}/increment-with-lease", taken)["lease_id"]
    lost, subflow, living, elsewhere = running_flow_runs(machine)
    # Both servers are killed, as by a machine that is switched off; state is in the folder.
    servers = [psutil.Process(first[name].pid) for name in NAMES[:2]]
    for server in servers:
        server.kill()
    while any(first[name].process for name in NAMES[:2]):
        time.sleep(0.1)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "mlflow              stopped" in result.output
    said.clear()
    with subprocess.Popen(
        ["/bin/sleep", "600"], env=os.environ | {"PREFECT__FLOW_RUN_ID": living}
    ) as process:
        up(machine, said.append)
        process.kill()
    assert "lost runs           1 ended" in said
    states = [
        ask(f"{machine.prefect}/api/flow_runs/{run}") for run in (lost, subflow, living, elsewhere)
    ]
    found = [state["state_type"] for state in states]
    assert found == ["CRASHED", "CRASHED", "RUNNING", "RUNNING"]
    assert states[0]["state"]["message"] == "its process has ended"
    second = Ledger.read(machine.ledger).started
    assert {name for name in NAMES if first[name] == second[name]} == set(NAMES[2:])
    assert ask(f"{machine.prefect}/api/work_pools/gpu-pool")["id"] == pool["id"]
    assert {state for state, _ in status(machine).values()} == {"healthy"}
    ask(f"{limits}/leases/{lease}/renew", {"lease_duration": 600})  # 410 if it were forgotten
    # So is a run that was about to start when its worker was lost.
    second["worker of gpu-pool"].end()
    state = {"state": {"type": "PENDING"}, "force": True}
    ask(f"{machine.prefect}/api/flow_runs/{living}/set_state", state)
    up(machine, said.append)
    assert ask(f"{machine.prefect}/api/flow_runs/{living}")["state_type"] == "CRASHED"
    second = Ledger.read(machine.ledger).started
    family = [p for s in second.values() for p in [s.process, *s.process.children(recursive=True)]]
    down(machine, said.append)
    assert not any(process.is_running() for process in family)
    assert bystander.poll() is None
    assert {state for state, _ in status(machine).values()} == {"stopped"}
    assert Machine.of(machine.folder) == machine  # remembered for `tclora up`


def test_workers_look_at_their_pools_often_unless_the_user_says_how_often(machine, monkeypatch):
    name = "PREFECT_WORKER_QUERY_SECONDS"
    monkeypatch.delenv(name, raising=False)
    assert [service.environment.get(name) for service in machine.services()] == [
        None, None, "2", "2"
    ]  # fmt: skip
    monkeypatch.setenv(name, "7")
    assert machine.services()[3].environment[name] == "7"


def test_a_port_that_is_taken_is_named_before_anything_starts(machine):
    with (
        socket.create_server(("127.0.0.1", machine.mlflow_port)),
        pytest.raises(ConfigError, match=r"must be free for mlflow.* --mlflow-port"),
    ):
        up(machine, lambda _: None)
    assert not machine.ledger.exists()


@pytest.mark.parametrize("name", machines._DATABASES)
def test_a_database_that_was_named_before_must_be_named_again(machine, monkeypatch, name):
    monkeypatch.setenv(name, "postgresql://user:hunter2@host/db")
    machine.folder.mkdir()
    Ledger(settings=machines._settings(machine)).write(machine.ledger)
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=f"{name} must be set as when this machine was started"):
        up(machine, lambda _: None)
    assert "hunter2" not in machine.ledger.read_text()


def test_a_number_that_another_process_has_by_now_is_not_ended(machine, bystander):
    stranger = Started.of(bystander.pid).model_copy(update={"began": 1.0})
    machine.folder.mkdir()
    Ledger(started={"prefect": stranger}).write(machine.ledger)
    said = []
    down(machine, said.append)
    assert said == ["prefect             was not running"]
    assert bystander.poll() is None
    assert Ledger.read(machine.ledger).started == {}


def test_what_was_started_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 2.0)  # for the child, which is not asked to end
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    started = Started.of(process.pid)
    while not (children := psutil.Process(process.pid).children()):
        pass
    assert started.end()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    process.communicate()
    assert not started.end()


def test_what_a_killed_process_leaves_behind_is_ended(tmp_path):
    """A server that is killed leaves its workers, which hold its port."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    sleep = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, sleep], start_new_session=True)
    started = Started.of(process.pid)
    while not (children := psutil.Process(process.pid).children()):
        pass
    process.kill()
    process.wait()
    assert [p.pid for p in started.survivors] == [p.pid for p in children]
    assert started.end()
    assert not any(child.is_running() for child in children)
    assert not started.end()


def test_services_start_beside_each_other(machine, monkeypatch):
    """Each is well when the other has begun."""
    monkeypatch.setattr(machines, "_LIMIT", 30.0)
    machine.root.mkdir()
    began = {name: machine.root / name for name in ("one", "other")}
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    said = []
    services = [
        Service(name, [sys.executable, "-c", code, str(began[name])], {}, began[other].exists)
        for name, other in (("one", "other"), ("other", "one"))
    ]
    machines._ensure(machine, services, said.append)
    assert said == [f"{name:<20}healthy" for name in began]


def test_a_service_that_dies_while_another_is_awaited_leaves_nothing_behind(machine):
    """Its child answers in its place, until both are ended and it is started anew."""
    machine.root.mkdir()
    slow, well, starts = (machine.root / name for name in ("slow", "well", "starts"))
    services = [
        Service(name, [sys.executable, "-c", code, *map(str, files)], {}, files[0].exists)
        for name, code, files in (("slow", SLOW, [slow]), ("other", DYING, [well, starts]))
    ]
    machines._ensure(machine, services, lambda _: None)
    while len(pids := [int(pid) for pid in starts.read_text().split()]) < 3:
        time.sleep(0.1)
    leader, child, again = pids
    assert Ledger.read(machine.ledger).started["other"].pid == again
    assert not any(running(pid) for pid in (leader, child))
    assert running(again)


def test_a_service_that_ends_at_once_shows_its_log(machine, monkeypatch):
    broken = Service(
        "mlflow", [sys.executable, "-c", "raise SystemExit('no such database')"], {}, lambda: False
    )
    machine.folder.mkdir()
    machine.root.mkdir()
    with pytest.raises(
        machines.JobError, match=r"(?s)mlflow must become healthy .*no such database"
    ):
        machines._ensure(machine, [broken], lambda _: None)


def test_a_service_that_hangs_is_started_anew(machine, monkeypatch):
    flag, well = machine.root / "tried", machine.root / "well"
    code = (
        "import pathlib, sys, time; flag, well = map(pathlib.Path, sys.argv[1:]); "
        "again = flag.exists(); flag.touch(); again and well.touch(); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(flag), str(well)]
    monkeypatch.setattr(machines, "_LIMIT", 5.0)
    machine.root.mkdir()
    said = []
    machines._ensure(machine, [Service("mlflow", command, {}, well.exists)], said.append)
    started = Ledger.read(machine.ledger).started["mlflow"]
    assert started.process
    assert said == [f"{'mlflow':<20}healthy"]


def test_a_folder_where_nothing_was_started_is_named(tmp_path):
    result = CliRunner().invoke(app, ["status", "--folder", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "start it with `tclora up`" in str(result.exception)
