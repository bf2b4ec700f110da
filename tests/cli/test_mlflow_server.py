"""MLflow's server with a login: who does not know the password gets nothing."""

import os
import subprocess
import urllib.error
import urllib.request
from contextlib import contextmanager

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from tclora.errors import ConfigError
from tclora_cli import mlflow_server
from tclora_cli.machine import Machine
from tclora_cli.mlflow_server import PASSWORD, USER
from tclora_cli.processes import Started, wait_until
from tests.cli.test_machine import free_ports

SECRET = "a password of 1 test"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf")
    monkeypatch.setenv(USER, "me")
    monkeypatch.setenv(PASSWORD, SECRET)
    return Machine(tmp_path / "state", tmp_path, 1, *free_ports(2))


@contextmanager
def served(service, log):
    with log.open("wb") as out:
        process = subprocess.Popen(
            service.command, env=os.environ | dict(service.environment), stdout=out, stderr=out
        )
    started = Started.of(process.pid)
    try:
        assert wait_until(service.healthy, started, 120), log.read_text()
        yield
    finally:
        started.end()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_who_does_not_know_the_password_sees_no_experiment(machine, monkeypatch, tmp_path):
    service = next(s for s in machine.services() if s.name == "mlflow")
    client = mlflow.MlflowClient(machine.mlflow)
    for _ in range(2):  # the second start finds the user
        with served(service, tmp_path / "log"):
            assert [e.name for e in client.search_experiments()] == ["Default"]
            run = client.create_run("0")
            client.log_metric(run.info.run_id, "loss", 1.5)
            (tmp_path / "text").write_text("x")
            client.log_artifact(run.info.run_id, tmp_path / "text")
            for user, password in (("me", "guessed"), ("other", SECRET)):
                with monkeypatch.context() as patch:
                    patch.setenv(USER, user)
                    patch.setenv(PASSWORD, password)
                    with pytest.raises(MlflowException, match="401"):
                        client.search_experiments()
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(  # noqa: S310
                    f"{machine.mlflow}/api/2.0/mlflow/runs/get?run_id=x"
                )
    for file in (tmp_path / "state").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert (machine.folder / "mlflow-login.key").stat().st_mode & 0o777 == 0o600


def test_half_a_login_is_refused(monkeypatch):
    monkeypatch.setenv(USER, "me")
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(ConfigError, match=f"{PASSWORD} must be set, since its counterpart is"):
        mlflow_server.login_asked()


def test_what_a_login_needs_is_named(monkeypatch):
    monkeypatch.setenv(USER, "me")
    monkeypatch.setenv(PASSWORD, SECRET)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tclora\[auth\]'"):
        mlflow_server.login_asked()
