"""Servers with logins: who does not know the password gets nothing, and a start says so."""

import os
import stat

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from tclora.errors import ConfigError
from tclora_cli import logins
from tclora_cli.logins import CLIENT, PASSWORD, SERVER, USER
from tclora_cli.machine import down, status, up
from tclora_cli.services import Machine
from tests.cli.test_machine import free_ports

SECRET, PREFECT = "a password of 1 test", "me:another password of 1 test"


def silent(_):
    pass


@pytest.fixture
def named(monkeypatch):
    pytest.importorskip("flask_wtf")
    for name, value in ((USER, "me"), (PASSWORD, SECRET), (SERVER, PREFECT), (CLIENT, PREFECT)):
        monkeypatch.setenv(name, value)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = Machine(tmp_path / "100% state", tmp_path / "root", 1, *free_ports(2))
    yield made
    down(made, silent)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_with_logins_is_open_to_those_who_know_them(named, machine, monkeypatch):
    up(machine, silent)
    assert {state for state, _ in status(machine).values()} == {"healthy"}
    client = mlflow.MlflowClient(machine.mlflow)
    assert [e.name for e in client.search_experiments()] == ["Default"]
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "loss", 1.5)
    client.log_text(run.info.run_id, "x", "text")
    for user, password in (("me", "guessed"), ("other", SECRET)):
        with monkeypatch.context() as patch:
            patch.setenv(USER, user)
            patch.setenv(PASSWORD, password)
            with pytest.raises(MlflowException, match="401"):
                client.search_experiments()
    up(machine, silent)  # leaves what runs
    for changes, message in (
        ({USER: "", PASSWORD: ""}, f"{USER} must be set as when this machine was started"),
        ({SERVER: "", CLIENT: ""}, f"{SERVER} must be set as when this machine was started"),
        ({USER: "other"}, f"{USER} must be 'me', the user of this machine's first start"),
        ({PASSWORD: "guessed password"}, "MLflow's server must know the login .* but refuses it"),
        ({SERVER: "me:x", CLIENT: "me:x"}, "Prefect's server must know the login"),
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            with pytest.raises(ConfigError, match=message) as found:
                up(machine, silent)
            assert "guessed" not in str(found.value)
    with monkeypatch.context() as patch:
        patch.delenv(CLIENT)
        with pytest.raises(ConfigError, match=f"{CLIENT} must be set to the USER:PASSWORD"):
            status(machine)
    down(machine, silent)
    assert stat.S_IMODE(machine.folder.stat().st_mode) == 0o700
    files = [file for file in machine.folder.rglob("*") if file.is_file()]
    assert machine.ledger in files
    for file in files:
        content = file.read_bytes()
        assert SECRET.encode() not in content, file
        assert PREFECT.encode() not in content, file


def test_servers_that_are_more_open_than_was_asked_for_are_told(named, monkeypatch):
    monkeypatch.setattr(logins, "_refuses", lambda url, login="": False)
    with pytest.raises(ConfigError, match=f"MLflow's server runs without the login that {USER}"):
        logins.check_servers("http://prefect", "http://mlflow")
    for name in (USER, PASSWORD):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=f"Prefect's server runs without the login that {SERVER}"):
        logins.check_servers("http://prefect", "http://mlflow")
    monkeypatch.delenv(SERVER)
    logins.check_servers("http://prefect", "http://mlflow")
    monkeypatch.setattr(logins, "_refuses", lambda url, login="": True)
    with pytest.raises(ConfigError, match=f"with a login, which {USER} does not name"):
        logins.check_servers("http://prefect", "http://mlflow")


def test_half_a_login_is_refused(named, monkeypatch, tmp_path):
    monkeypatch.setenv(CLIENT, "me:other")
    with pytest.raises(ConfigError, match=f"{CLIENT} must be what {SERVER} is") as found:
        logins.check_named({}, tmp_path)
    assert "password" not in str(found.value)
    monkeypatch.setenv(PASSWORD, "short")
    with pytest.raises(ConfigError, match=f"{PASSWORD} must have 12 characters"):
        logins.mlflow_asked()
    monkeypatch.delenv(PASSWORD)
    with pytest.raises(ConfigError, match=f"{PASSWORD} must be set, since its counterpart is"):
        logins.mlflow_asked()


@pytest.mark.parametrize("lacking", ["Flask-WTF", "MLflow"])
def test_what_a_login_needs_is_named(named, monkeypatch, lacking):
    if lacking == "MLflow":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "3.16.2")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs mlflow 3\.17 .*pip install 'tclora\[auth\]'"):
        logins.mlflow_asked()


def test_nothing_is_written_where_no_login_is_asked_for(tmp_path):
    assert not os.environ.get(USER)
    assert logins.mlflow_settings(tmp_path / "state") == {}
    assert logins.remembered() == {}
    assert not (tmp_path / "state").exists()
