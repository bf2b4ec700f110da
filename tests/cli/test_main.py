import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tclora.config import Config, config_keys, load_config
from tclora.errors import LibraryError
from tclora.library.manifest import write_manifest
from tclora.model.locate import BUILTIN_BASE
from tclora_cli.main import app
from tests.library.examples import describe

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_config_prints_what_it_resolved_to():
    result = invoke("config", DEMO, "--set", "train.epochs=0.5", "--set", "name=mine")
    assert result.exit_code == 0
    printed = yaml.safe_load(result.stdout)
    wanted = load_config(DEMO, ["train.epochs=0.5", "name=mine"])
    assert Config.model_validate(printed) == wanted


def test_the_schema_describes_every_section():
    result = invoke("config", "--schema")
    schema = json.loads(result.stdout)
    assert set(schema["properties"]) == {key for key in config_keys() if "." not in key}
    assert schema["$defs"]["TrainConfig"]["properties"]["r"]["description"] == "LoRA rank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "--set", "train.epoch=1"], "did you mean 'train.epochs'"),
        (["config", "none.yaml"], "'none.yaml' does not exist"),
        (["report", "."], "is not a tclora library"),
    ],
)
def test_errors_a_user_can_repair_end_with_one_message(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "tclora_cli", *arguments],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr  # plain text, whatever the terminal's width
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_whether_a_configuration_fits(tiny_model_dir):
    fits = ["--set", f"base_model={tiny_model_dir}", "--set", "train.template=plain"]
    result = invoke("doctor", *fits)
    assert result.exit_code == 0
    assert "fits this machine" in result.stdout
    assert "nothing: models and data are on this machine" in result.stdout
    assert "package torch" in result.stdout


def test_doctor_names_what_is_missing(tmp_path):
    result = invoke("doctor", "--set", "base_model=someone/large", "--set", "data.path=org/data")
    assert result.exit_code == 1
    assert "base model someone/large, data org/data" in result.stdout
    assert "'someone/large' must be" in result.stdout
    assert BUILTIN_BASE in result.stdout


def test_the_ui_needs_a_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("os.execvp", None)  # a server must not take this process over
    with pytest.raises(LibraryError, match="holds no MLflow store yet; run the pipeline first"):
        app(["ui", "--output", str(tmp_path)], standalone_mode=False)


def test_verify_names_the_file_that_differs(tmp_path):
    for name in ("adapters/one", "adapters/two", "clusters"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = ("adapters", "clusters")
    write_manifest(tmp_path, describe(), names)
    whole = invoke("verify", str(tmp_path))
    assert (whole.exit_code, whole.stdout) == (0, "whole: 3 files\n")
    (tmp_path / "clusters").write_text("other")
    broken = invoke("verify", str(tmp_path))
    assert broken.exit_code == 1
    assert "clusters differs" in broken.stdout
    assert "adapters" not in broken.stdout


def test_help_lists_the_commands():
    result = invoke("--help")
    for command in ("run", "report", "verify", "ui", "config", "doctor"):
        assert command in result.stdout
