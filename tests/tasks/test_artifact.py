import json

import pytest
from pydantic import ValidationError

from tasks.artifact import Artifact


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    return Artifact.of(
        tmp_path, tmp_path / "folder", tmp_path / "b", metrics={"loss": 1.5}, info={"rows": 3}
    )


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
    other = Artifact.of(artifact.root, *artifact.paths, metrics={"loss": 9.0})
    assert other.digest == artifact.digest
    (artifact.root / "b").write_text("changed")
    assert Artifact.of(artifact.root, *artifact.paths).digest != artifact.digest


def test_a_linked_artifact_is_the_same_files_elsewhere(artifact, tmp_path):
    root = tmp_path / "elsewhere"
    linked = artifact.linked(root)
    assert linked.root == root
    assert (linked.digest, linked.metrics, linked.info) == (
        artifact.digest, artifact.metrics, artifact.info,
    )  # fmt: skip
    assert (root / "b").samefile(artifact.root / "b")
    assert Artifact.model_validate_json(linked.model_dump_json()) == linked
    stamp = (root / "b").stat().st_ino
    artifact.linked(root)
    assert (root / "b").stat().st_ino == stamp
    (root / "folder" / "new").write_text("damage")
    artifact.linked(root)
    assert not (root / "folder" / "new").exists()
