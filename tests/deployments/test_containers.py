"""The container image and the Compose file, as far as they can be read without an engine."""

import re
from pathlib import Path

import pytest
import yaml
from prefect.settings import get_current_settings

from tclora_cli.logins import PASSWORD, RULES, USER

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())
CONTAINERFILE = (ROOT / "deployments" / "Containerfile").read_text()
ONE_OFF = {"bucket", "deploy"}


@pytest.mark.parametrize("name", sorted(set(COMPOSE["services"]) - ONE_OFF))
def test_a_service_says_whether_it_is_healthy(name):
    assert COMPOSE["services"][name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", ["worker", "jobs"])
def test_workers_serve_what_their_health_check_asks(name):
    service = COMPOSE["services"][name]
    assert "--with-healthcheck" in service["command"]
    asked = service["healthcheck"]["test"][-1]
    assert f":{get_current_settings().worker.webserver.port}/health" in asked
    assert service["environment"]["PREFECT_WORKER_WEBSERVER_HOST"] in asked


def test_services_wait_for_what_they_need():
    services = COMPOSE["services"]
    for name, service in services.items():
        for needed, condition in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_OFF else "service_healthy"
            assert condition["condition"] == wanted, (name, needed)
            assert needed in services


def test_ports_are_of_the_loopback_alone():
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_secrets_come_from_the_environment_and_have_no_default():
    text = (ROOT / "deployments" / "compose.yaml").read_text()
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*)([^}]*)\}", text)
    assert secrets
    assert {kind[:2] for _, kind in secrets} == {":?"}
    example = (ROOT / "deployments" / "example.env").read_text()
    named = {line.partition("=")[0] for line in example.splitlines()}
    assert {name for name, _ in secrets} <= named


def test_mlflow_wants_the_login_that_its_clients_have():
    services = COMPOSE["services"]
    assert "--app-name=basic-auth" in services["mlflow"]["command"]
    server, client = services["mlflow"]["environment"], services["worker"]["environment"]
    for name, asked in ((USER, "USERNAME"), (PASSWORD, "PASSWORD")):
        assert client[name] == server[f"MLFLOW_AUTH_ADMIN_{asked}"]
    assert {name for name, s in services.items() if USER in s.get("environment", {})} == {"worker"}
    rules = COMPOSE["configs"]["mlflow-login.ini"]["content"]
    assert rules == RULES.format(users="/users/mlflow.db")
    assert server["MLFLOW_AUTH_CONFIG_PATH"] == "/mlflow-login.ini"
    assert services["mlflow"]["volumes"] == ["users:/users"]
    assert re.search(r"--owner=1000 .*/users", CONTAINERFILE)


def test_images_are_named_with_their_versions():
    for service in COMPOSE["services"].values():
        assert re.search(r":[^:]*\d", service["image"]) or service["image"] == "tclora:latest"


def test_the_image_is_pinned_and_runs_without_rights():
    assert "--constraint constraints.txt" in CONTAINERFILE
    lines = CONTAINERFILE.splitlines()
    assert lines[-1].startswith(("CMD", "ENTRYPOINT"))
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
    assert all(re.search(r":\d", line) for line in lines if line.startswith("FROM "))
