"""The direction of imports: tclora_cli, flows, tasks, tclora; never the other way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "tclora": {"prefect", "mlflow", "tasks", "flows", "tclora_cli"},
    "tasks": {"flows", "tclora_cli"},
    "flows": {"tclora_cli"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_layer_does_not_import_from_above(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        if name.partition(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


def test_the_layers_below_are_used():
    used = {name.partition(".")[0] for f in (ROOT / "flows").glob("*.py") for name in imported(f)}
    assert {"tasks", "tclora", "prefect"} <= used
