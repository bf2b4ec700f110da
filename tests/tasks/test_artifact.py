import json
import sys
import textwrap

import pytest
from pydantic import ValidationError

from tasks.artifact import Artifact, _closure, _identity, source_digest
from tclora.config import TrainConfig


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    return Artifact.of(tmp_path, "folder", "b", metrics={"loss": 1.5}, info={"rows": 3})


def test_an_artifact_survives_as_json_while_its_files_do(artifact):
    text = artifact.model_dump_json()
    assert Artifact.model_validate_json(text) == artifact
    assert artifact.path == artifact.root / "folder"
    assert json.loads(text)["info"] == {"rows": 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "b").unlink(), "b does not exist any more"),
        (lambda root: (root / "b").write_text("3"), "b has changed since it was written"),
        (lambda root: (root / "folder" / "new").write_text(""), "folder has changed"),
    ],
)
def test_missing_or_changed_files_make_a_stored_artifact_invalid(artifact, damage, message):
    text = artifact.model_dump_json()
    damage(artifact.root)
    with pytest.raises(ValidationError, match=message):
        Artifact.model_validate_json(text)


def test_the_digest_follows_the_files_alone(artifact):
    other = Artifact.of(artifact.root, "folder", "b", metrics={"loss": 9.0})
    assert other.digest == artifact.digest
    (artifact.root / "b").write_text("changed")
    assert Artifact.of(artifact.root, "folder", "b").digest != artifact.digest


def test_the_identity_of_parameters_sees_what_matters(artifact):
    assert _identity({"a": artifact}) == _identity(
        {"a": Artifact.of(artifact.root, "folder", "b", info={"rows": 4})}
    )
    assert _identity(TrainConfig(r=4)) != _identity(TrainConfig(r=8))
    assert _identity((1, "x")) == _identity([1, "x"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the place of tclora, to be changed; `use` imports `helper` imports `deep`."""
    root = tmp_path / "tclora"
    (root / "config").mkdir(parents=True)
    sources = {
        "__init__": "",
        "use": "def run():\n    from tclora.helper import f\n    return f()",
        "helper": "import tclora.deep\nf = tclora.deep.f",
        "deep": "from tclora import leaf\ndef f(): return leaf.x",
        "leaf": "from tclora.config import sections\nx = 1",
        "config/__init__": "",
        "config/sections": "",
        "other": "x = 1",
    }
    for name, source in sources.items():
        (root / f"{name}.py").write_text(textwrap.dedent(source))
    for name in [name for name in sys.modules if name == "tclora" or name.startswith("tclora.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    source_digest.cache_clear()
    yield root
    source_digest.cache_clear()
    for name in [name for name in sys.modules if name == "tclora" or name.startswith("tclora.")]:
        monkeypatch.delitem(sys.modules, name)


def digest():
    source_digest.cache_clear()
    return source_digest("tclora.use")


@pytest.mark.parametrize("name", ["use", "helper", "deep", "leaf"])
def test_the_source_digest_sees_what_is_imported_at_any_depth(package, name):
    before = digest()
    assert digest() == before
    with (package / f"{name}.py").open("a") as file:
        file.write("\n# changed\n")
    assert digest() != before


def test_the_source_digest_ignores_what_is_not_imported(package):
    before = digest()
    (package / "other.py").write_text("x = 2")
    assert digest() == before


@pytest.mark.parametrize("name", ["__init__", "sections"])
def test_the_configuration_counts_by_its_values_not_by_its_source(package, name):
    before = digest()
    (package / "config" / f"{name}.py").write_text("x = 2")
    assert digest() == before


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        (
            "tclora.train",
            {"tclora.model.loss", "tclora.model.tokens", "tclora.adapter", "tclora.files"},
        ),
        (
            "tclora.evaluate",
            {"tclora.model.loss", "tclora.model.tokens", "tclora.evaluate.scoring"},
        ),
        ("tclora.data.examples", {"tclora.data.demo", "tclora.data.frame", "tclora.data.readers"}),
        ("tclora.tensor", {"tclora.tensor.cp", "tclora.tensor.als", "tclora.tensor.compress"}),
        ("tclora.merge", {"tclora.merge.methods.cp", "tclora.merge.registry", "tclora.adapter"}),
    ],
)
def test_the_stages_own_modules_are_found(module, needed):
    found = _closure(module)
    assert needed <= found.keys()
    assert all(path.suffix == ".py" for path in found.values())
    assert not any(name.startswith("tclora.config") for name in found)


def test_an_artifact_alone_is_its_first_file(artifact):
    alone = artifact.alone()
    assert alone.path == artifact.path
    assert _identity(alone) == _identity(Artifact.of(artifact.root, "folder"))
