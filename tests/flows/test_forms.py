"""Deployed flows: the form of their parameters, and what is refused."""

import jsonschema
import pytest
import yaml

from flows.forms import allowed_root, check_places, run_pipeline, run_study
from flows.job import job
from tclora.config import Config, load_config
from tclora.errors import ConfigError
from tests.test_config import CONFIGS

ROOT = CONFIGS[0].parents[1]
FLOWS = {
    f"{flow.fn.__module__}.{flow.fn.__name__}": flow for flow in (run_pipeline, run_study, job)
}
DEPLOYMENTS = {
    entry["name"]: entry
    for entry in yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
}


def schema_of(flow):
    schema = flow.parameters
    return {
        "type": "object",
        "properties": schema.properties,
        "required": schema.required or [],
        "$defs": schema.definitions,
        "definitions": schema.definitions,
        "additionalProperties": False,
    }


def test_everything_is_deployed():
    assert set(DEPLOYMENTS) == {
        "job", "demo", "phi3-flan", "mistral-7b-flan", "evaluation", "study"
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_a_deployment_is_whole_and_its_parameters_fit_the_form(name):
    entry = DEPLOYMENTS[name]
    assert entry["enforce_parameter_schema"]
    assert entry["pull"] == entry["schedules"] == []
    assert "tclora" in entry["tags"]
    # Runs that wait for jobs of their own pool could fill it.
    assert entry["work_pool"]["name"] == ("gpu-pool" if name == "job" else "run-pool")
    flow = FLOWS[entry["entrypoint"]]
    if name != "job":
        assert entry["concurrency_limit"]["limit"] > 0
        jsonschema.validate(entry["parameters"], schema_of(flow))
        assert flow.validate_parameters(entry["parameters"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deployed_configurations_are_those_of_the_files(path):
    assert load_config(DEPLOYMENTS[path.stem]["parameters"]["config"]) == load_config(path)


@pytest.mark.parametrize(
    "bad",
    [
        {"config": {"train": {"r": 0}}},
        {"config": {"train": {"rr": 4}}},
        {"config": {"name": "../up"}},
        {"config": "/etc/passwd"},
        {"overrides": ["no value"]},
        {"until": "tea"},
        {"unknown": 1},
    ],
)
def test_the_form_refuses_bad_values(bad):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema_of(run_pipeline))


def test_the_form_names_the_studies():
    jsonschema.validate({"name": "ranks"}, schema_of(run_study))
    with pytest.raises(jsonschema.ValidationError, match="'nothing' is not one of"):
        jsonschema.validate({"name": "nothing"}, schema_of(run_study))


def test_every_field_of_the_form_is_described():
    train = schema_of(run_pipeline)["definitions"]["TrainConfig"]["properties"]
    assert all(field.get("description") for field in train.values())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"output": "../elsewhere"}, "output"),
        ({"output": "/etc"}, "output"),
        ({"output": "link/runs"}, "output"),
        ({"data": {"path": "/etc/passwd"}}, "data.path"),
        ({"data": {"path": "rows/../../x.jsonl"}}, "data.path"),
        ({"data": {"ood_path": "link"}}, "data.ood_path"),
        ({"base_model": "/models/secret"}, "base_model"),
        ({"embed": {"model": "../e"}}, "embed.model"),
        ({"execution": {"store": "file:///etc/evil"}}, "execution.store"),
        ({"publish_to": "file:///etc/evil"}, "publish_to"),
        ({"publish_to": "local:///etc/evil"}, "publish_to"),
        ({"evaluate": {"lm_eval": ["/etc/task.yaml"]}}, "evaluate.lm_eval"),
        ({"evaluate": {"lm_eval": ["arc_easy", "../task.yaml"]}}, "evaluate.lm_eval"),
    ],
)
def test_places_outside_of_the_root_are_refused(values, key, tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to("/etc")
    monkeypatch.chdir(tmp_path / "root")
    with pytest.raises(ConfigError, match=f"(?m)^  - {key} must be below {tmp_path}/root"):
        check_places(load_config(values))


def test_places_inside_and_ids_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_places(Config())
    check_places(load_config({"output": f"{tmp_path}/runs", "base_model": "org/model"}))
    stores = {"publish_to": "s3://bucket/x", "execution": {"store": f"file://{tmp_path}/store"}}
    check_places(load_config({**stores, "evaluate": {"lm_eval": ["arc_easy", "mine.yaml"]}}))


def test_a_worker_must_name_its_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TCLORA_ROOT", str(tmp_path))
    assert allowed_root() == tmp_path.resolve()
    for wrong in ("", str(tmp_path / "none")):
        monkeypatch.setenv("TCLORA_ROOT", wrong)
        with pytest.raises(ConfigError, match="TCLORA_ROOT must be, in the worker's environment"):
            allowed_root()
