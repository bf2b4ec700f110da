import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tclora.config import Config, load_config, parse_config
from tclora.config.execution import ExecutionConfig
from tclora.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configurations():
    assert "demo.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_survives_a_round_trip(path):
    config = load_config(path)
    assert config.name == yaml.safe_load(path.read_text())["name"]
    assert parse_config(config.model_dump(mode="json")) == config


def test_defaults_alone_are_valid():
    assert load_config() == Config()


def test_all_problems_are_reported_at_once():
    values = {
        "name": "a/b",
        "train": {"r": 0, "dropout": 1.5, "epoch": 2},
        "cluster": {"noise": "keep", "k": "many"},
        "factorise": {"rank": "x"},
        "merge": {"methods": ["uniform"], "primary": "tc-lora"},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(values, source="mine.yaml")
    text = str(caught.value)
    assert text.startswith("mine.yaml has ")
    for wanted in (
        "name: ", "train.r: ", "train.dropout: ", "train.epoch: unknown key", "cluster.noise: ",
        "cluster.k: ", "factorise.rank: ", "merge: primary must be one of methods ['uniform']",
        "got 0", "got 1.5", "got 'keep'",
    ):  # fmt: skip
        assert wanted in text


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"r": -4}},
        {"factorise": {"rank": 0}},
        {"cluster": {"k": 0}},
        {"data": {"test_fraction": 1.2}},
        {"train": {"lr": 0}},
        {"train": {"target_modules": 3}},
        {"merge": {"scales": [0.4, 0.0]}},
        {"merge": {"scales": [0.4], "sample_rows": 0}},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=r"has [12] problem"):
        parse_config(values)


def test_a_section_that_is_none_is_told_so():
    with pytest.raises(ConfigError, match="train: must be a section of keys and values, got 5"):
        parse_config({"train": 5})


def test_overrides_win_over_the_file_and_are_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {epochs: 3, r: 8}\nname: mine\n")
    config = load_config(
        path,
        ["train.epochs=0.5", "cluster.k=auto", "merge.methods=[tc-lora, cat]", "data.path=x.jsonl"],
    )
    assert config.train.epochs == 0.5
    assert config.train.r == 8
    assert config.cluster.k == "auto"
    assert config.merge.methods == ("tc-lora", "cat")
    assert config.data.path == "x.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "must be key=value"),
        ("=1", "must be key=value"),
        ("seed.x=1", "'seed' is not a section"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epoch=1", "did you mean 'train.epochs'"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["seed=1", override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"a: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "must be a mapping of sections, got list"),
        (b"name: \xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files_are_config_errors(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    assert load_config(path) == Config()


def test_a_configuration_cannot_be_changed():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.train.r = 1


def test_library_dir_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_config({"name": "x"}).library_dir == tmp_path / "runs" / "x"


@pytest.mark.parametrize("given", [{"dtype": "auto"}, {"dtype": "float32", "engine": "auto"}])
def test_what_depends_on_the_machine_is_named_where_jobs_run_elsewhere(given):
    (key,) = (name for name, value in given.items() if value == "auto")
    elsewhere = {"backend": "deployment", "store": "file:///store"}
    with pytest.raises(ConfigError, match=rf"train\.{key} must be .*, got 'auto'"):
        parse_config({"execution": elsewhere, "train": given})


@pytest.mark.parametrize(
    ("field", "address"),
    [
        ("ray_address", "somewhere"),
        ("ray_address", "tcp://host:1"),
        ("ray_address", "host:port"),
        ("dask_address", "ray://host:1"),
        ("dask_address", "host:1/path"),
    ],
)
def test_a_cluster_address_of_another_form_is_refused(field, address):
    with pytest.raises(ConfigError, match=f"{field} must be HOST:PORT or .*, got '{address}'"):
        load_config({"execution": {field: address}})


@pytest.mark.parametrize("address", [None, "host:1", "ray://host:1"])
def test_the_weights_type_is_to_be_named_where_workers_are_not_this_machines(address):
    values = {"execution": {"backend": "ray", "ray_address": address}}
    if address is None:
        assert load_config(values).execution.workers_here
        return
    with pytest.raises(ConfigError, match=r"train\.dtype must be bfloat16 or float32"):
        load_config(values)
    values["train"] = {"dtype": "float32"}
    assert load_config(values).execution.address == address


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "s3://me:secret@bucket/x"}, "output must hold no credentials"),
        ({"output": "s3://bucket/../x"}, "output must not climb up"),
        ({"output": "s3://a/x", "publish_to": "s3://b/x"}, "output and publish_to must be one URL"),
        ({"output": "s3://a/x", "publish_to": "s3://me:secret@b/x"}, "must hold no credentials"),
        ({"output": "s3://a/../x", "sed": 1}, "sed: unknown key"),
        ({"publish_to": "bucket"}, "publish_to must be a URL such as"),
        ({"publish_to": "s3://me:secret@bucket/x"}, "publish_to must hold no credentials"),
    ],
)
def test_stores_are_urls_without_secrets(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_config(values)
    assert "secret" not in str(caught.value)
    assert " : " not in str(caught.value)


@pytest.mark.parametrize("execution", [{}, {"retries": 1}, ExecutionConfig(retries=1)])
def test_an_output_that_is_a_url_is_where_jobs_exchange_files_and_the_library_goes(execution):
    config = parse_config({"output": "s3://bucket/x/", "name": "mine", "execution": execution})
    assert config.publish_to == config.execution.store == "s3://bucket/x"
    assert config.execution.retries == ExecutionConfig.model_validate(execution).retries
    assert config.library_dir == Path("runs/mine").absolute()
    assert parse_config(config.model_dump(mode="json")) == config
    assert Config.model_validate_json('{"output": "s3://bucket/x", "name": "mine"}').publish_to
    own = load_config({"output": "s3://bucket/x"}, ["execution.store=file:///mnt/store"])
    assert own.publish_to == "s3://bucket/x"
    assert own.execution.store == "file:///mnt/store"


def test_a_resolved_configuration_takes_another_output():
    resolved = parse_config({"output": "s3://bucket/x"}).model_dump(mode="json")
    other = load_config(resolved, ["output=s3://bucket/y"])
    assert other.publish_to == other.execution.store == "s3://bucket/y"
    given = ["output=s3://bucket/y", "execution.store=file:///s"]
    with pytest.raises(ConfigError, match="or set publish_to=null"):
        load_config(resolved, given)
    apart = load_config(resolved, [*given, "publish_to=null"])
    assert apart.publish_to == "s3://bucket/y"
    assert apart.execution.store == "file:///s"
