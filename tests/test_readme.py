"""The README's Python example and commands are true."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tclora.adapter import Adapter, LoraFactors, read_adapter, write_adapter
from tclora_cli.main import app
from tests.route.conftest import *  # noqa: F403

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def paths(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        factors = LoraFactors(
            torch.randn(12, 4, generator=generator), torch.randn(4, 10, generator=generator)
        )
        write_adapter(Adapter(name, {"layer.q_proj": factors}, "base"), tmp_path / name)
    return [tmp_path / name for name in ("a", "b", "c")]


def test_the_example_runs(paths, monkeypatch, tmp_path, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names = {"paths": paths}
    exec(code, names)  # noqa: S102
    assert "of the adapters' energy" in capsys.readouterr().out
    assert set(read_adapter(tmp_path / "merged").modules) == {"layer.q_proj"}
    assert names["own"].modules["layer.q_proj"].shape == (12, 10)


def test_the_routed_example_runs(library, monkeypatch, tmp_path, capsys):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    (tmp_path / "runs").mkdir()
    library.rename(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out.count("cluster-1") == 2


def test_every_command_it_names_exists():
    named = set(re.findall(r"`tclora (\w+)", README.read_text()))
    listed = CliRunner().invoke(app, ["--help"]).output
    assert named
    assert all(command in listed for command in named)


def test_its_pictures_and_files_exist():
    text = README.read_text()
    linked = re.findall(r"\]\((?!http)([^)]+)\)", text)
    linked += re.findall(r"(configs/[\w-]+\.yaml)", text)
    assert linked
    assert [name for name in linked if not (README.parent / name).exists()] == []
