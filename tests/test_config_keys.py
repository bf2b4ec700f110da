"""Keys of the configuration: described, refused where unknown, kept under their former names."""

import pytest

from tclora.cluster.registry import clusterers
from tclora.config import (
    ClusterConfig,
    Config,
    RouterConfig,
    config_keys,
    load_config,
    parse_config,
)
from tclora.config.loading import RENAMED
from tclora.errors import ConfigError
from tclora.route.router import routers


@pytest.mark.parametrize(
    ("values", "key", "suggestion"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"learning_rat": 1}}, "train.learning_rat", None),
        ({"train": {"epoch": 1}}, "train.epoch", "train.epochs"),
        ({"epochs": 1}, "epochs", "train.epochs"),
        ({"factorise": {"n_start": 1}}, "factorise.n_start", "factorise.n_starts"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(values, key, suggestion):
    with pytest.raises(ConfigError, match=f"{key}: unknown key") as caught:
        parse_config(values)
    if suggestion:
        assert f"did you mean {suggestion!r}?" in str(caught.value)


def test_a_renamed_key_keeps_working_with_a_notice(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text("route: {mode: softmax, top_k: 2}\n")
    config = load_config(path)
    assert (config.route.router, config.route.top_k) == ("softmax", 2)
    assert "run.yaml: route.mode is now route.router" in caplog.text
    caplog.clear()
    assert load_config(None, ["route.mode=membership"]).route.router == "membership"
    assert "--set: route.mode is now route.router" in caplog.text
    assert load_config(path, ["route.router=nearest"]).route.router == "nearest"
    assert load_config(path, ["route.mode=nearest"]).route.router == "nearest"
    values = {"route": {"mode": "softmax"}}
    assert parse_config(values).route.router == "softmax"
    assert values == {"route": {"mode": "softmax"}}
    with pytest.raises(ConfigError, match=r"must have route\.router alone, got route\.mode too"):
        load_config({"route": {"mode": "softmax", "router": "nearest"}})


def test_renamed_keys_have_their_new_names_and_not_their_old_ones(caplog):
    known = config_keys()
    assert set(RENAMED.values()) <= set(known)
    assert not set(RENAMED) & set(known)
    load_config()
    assert caplog.text == ""


def test_every_key_is_documented():
    for dotted in config_keys():
        section = Config
        for name in dotted.split("."):
            field = section.model_fields[name]
            section = field.annotation
        is_section = "model_fields" in dir(section)
        assert is_section or field.description, dotted


@pytest.mark.parametrize(
    ("section", "field", "variants"),
    [(ClusterConfig, "method", clusterers), (RouterConfig, "router", routers)],
)
def test_built_in_variants_are_named_where_one_is_chosen(section, field, variants):
    description = section.model_fields[field].description
    names = [name for name in variants if variants.module(name).partition(".")[0] == "tclora"]
    assert names
    assert [name for name in names if name not in description] == []


VALUES = {
    "route.mode": "softmax",
    "merge.calibration_rows": 3,
    "merge.refine_steps": 2,
    "evaluate.harness": ("piqa",),
    "evaluate.harness_limit": 7,
}


@pytest.mark.parametrize("former", sorted(RENAMED))
def test_every_former_key_sets_its_present_one(former, caplog):
    section, key = former.split(".")
    config = load_config({section: {key: VALUES[former]}})
    place, present = RENAMED[former].split(".")
    assert getattr(getattr(config, place), present) == VALUES[former]
    assert f"{former} is now {RENAMED[former]}" in caplog.text
    value = list(VALUES[former]) if former == "evaluate.harness" else VALUES[former]
    assert load_config(None, [f"{former}={value}"]) == config
