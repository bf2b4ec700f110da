import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tclora.library import names
from tclora.library.layout import Layout, statistics_file

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("tclora", "tasks", "flows", "tclora_cli", "benchmarks")
FILES = (
    "library.json", "report.html", "clusters.parquet", "centroids.safetensors",
    "factors.safetensors", "explained_variance.parquet", "routing.parquet", "routed.json",
    "gates.safetensors", "router.safetensors", "examples.parquet", "embeddings.safetensors",
    "tokens.arrow", "rank.json", "items.parquet", "summary.parquet", "recovery.parquet",
    "lm_eval.parquet",
)  # fmt: skip
FOLDERS = (
    "adapters", "training", "merged", "routed", "evaluation", "work", "rows", "statistics",
    "scales", "items", "checkpoints",
)  # fmt: skip
NAMED = re.compile(
    "|".join(map(re.escape, FILES)) + rf"|^({'|'.join(FOLDERS)})/|/({'|'.join(FOLDERS)})$|^cluster-"
)


def test_paths_are_absolute_and_named_below_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout(Path("runs/demo"))
    assert layout.root == tmp_path / "runs" / "demo"
    assert layout.adapter("joint") == tmp_path / "runs/demo/adapters/joint"
    assert layout.name(layout.merged("tc-lora")) == "merged/tc-lora"
    assert layout.path("merged/tc-lora") == layout.merged("tc-lora")
    with pytest.raises(ValueError, match="is not in the subpath"):
        layout.name(tmp_path / "elsewhere")


def test_no_two_things_have_one_place(tmp_path):
    layout = Layout(tmp_path)
    values = [getattr(layout, name) for name in vars(Layout) if name[0] != "_"]
    paths = [value for value in values if isinstance(value, Path)]
    for make in (layout.adapter, layout.training, layout.merged, layout.rows, layout.row_tokens,
                 layout.statistics, layout.scale, layout.items, layout.lm_eval,
                 layout.checkpoint):  # fmt: skip
        paths.append(make("x"))
    routed, tables = layout.routed, layout.evaluation
    paths += [routed.folder, routed.info, routed.gates, routed.router]
    paths += [tables.items, tables.summary, tables.recovery, tables.lm_eval]
    assert len(paths) == len(set(paths)) > 30
    assert all(path.is_relative_to(tmp_path) for path in paths)
    assert set(FILES) == {path.name for path in paths} & set(FILES)  # else this file is outdated
    assert statistics_file(layout.all_statistics, "x") == layout.statistics("x")


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_else_knows_a_file_name(package):
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {text!r}"
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if not path.is_relative_to(REPOSITORY / "tclora" / "library")
        for line, text in literals(path)
    ]
    assert found == []


def literals(path):
    """Yield line and text of what names a file or folder of a library, prose left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            folder = node.right
            if isinstance(folder, ast.Constant) and folder.value in FOLDERS:
                yield folder.lineno, folder.value
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " not in node.value
            and NAMED.search(node.value)
        ):
            yield node.lineno, node.value


def test_clusters_are_named_by_number():
    assert names.cluster_name(3) == "cluster-3"
    for number in (0, 7, 10, 123):
        assert names.cluster_number(names.cluster_name(number)) == number
    for other in ("joint", "cluster-", "cluster-x", "cluster-03", "cluster--1", "my-cluster-3"):
        assert names.cluster_number(other) is None


def test_a_library_is_opened_without_heavy_imports():
    """What ``tclora verify`` and the cache need of a library must not cost seconds."""
    script = (
        "import sys, tclora.library.manifest, tclora.library.staging\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'peft', 'prefect', 'mlflow'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
