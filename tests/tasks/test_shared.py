"""What runs on several libraries have in common is linked, not made again."""

import shutil
from pathlib import Path

import pytest
from prefect import flow

from tasks.artifact import Artifact, Artifacts
from tasks.keys import stage
from tasks.progress import JobProgress
from tasks.shared import LinkedStages, StoredStages
from tasks.where import Where
from tclora.files import sha256_path
from tclora.jobs.run import LocalExecutor
from tclora.library.layout import Layout
from tclora.store.objects import Store
from tclora.store.stages import StageRecords

MADE: list[Path] = []


def write(root, name, text):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@stage("shout")
def shout(source: Artifact, times: int, where: Where) -> Artifact:
    """Write a text in capitals."""
    MADE.append(where.layout.root)
    text = source.path.read_text().upper() * times
    file = write(where.layout.root, "folder/shout", text)
    return Artifact.of(where.layout.root, file.parent, info={"times": times})


@flow(name="shouting", validate_parameters=False)
def shouting(root, text, times, shared):
    where = Where(Layout(root), None, LocalExecutor(), JobProgress(), shared=shared)
    source = Artifact.of(root, write(root, "source", text))
    return shout(source, times, where)


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_is_done_once_for_all_who_share(tmp_path):
    shared = [LinkedStages(tmp_path / "shared")]

    def made(name, text="hello", times=1, shared=shared):
        MADE.clear()
        found = shouting(tmp_path / name, text, times, shared)
        assert found.root == tmp_path / name
        assert (found.path / "shout").read_text() == text.upper() * times
        assert found.info == {"times": times}
        return bool(MADE)

    assert made("a")
    assert not made("b")
    same = [(tmp_path / name / "folder/shout").stat().st_ino for name in "ab"]
    assert same[0] == same[1]
    assert made("c", times=2)
    assert made("d", text="another")
    assert made("e", shared=())
    (tmp_path / "a/folder/shout").unlink()  # the record's own files are gone
    assert made("f")
    assert not made("g")


def linked(tmp_path):
    return LinkedStages(tmp_path)


def stored(tmp_path):
    store = Store(f"file://{tmp_path}/store", pauses=())
    return StoredStages(StageRecords.of_library(store, tmp_path / "library"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", [linked, stored])
def test_several_artifacts_and_files_replace_what_is_there(tmp_path, kind):
    shared = kind(tmp_path)
    root, other = tmp_path / "one", tmp_path / "two"
    result: Artifacts = {
        name: Artifact.of(root, write(root, f"{name}/x", name), write(root, f"{name}.json", "{}"))
        for name in "ab"
    }
    shared.record("key", result)
    write(other, "a/x", "former")
    found = shared.take_over("key", other)
    assert {name: part.files for name, part in found.items()} == {
        name: part.files for name, part in result.items()
    }
    assert (other / "a/x").read_text() == "a"
    assert shared.take_over("another", other) is None
    assert shared.take_over("key", root) == result


def test_from_a_store_a_stage_is_taken_over_without_the_folder_that_it_was_made_in(tmp_path):
    shared, root = stored(tmp_path), tmp_path / "one"
    made = Artifact.of(root, write(root, "a/x", "1").parent, metrics={"m": 0.5}, info={"i": [1]})
    shared.record("key", made)
    shutil.rmtree(root)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert shared.take_over("key", root) == made
    another = StageRecords.of_library(shared.records.store, tmp_path / "other" / "library")
    assert StoredStages(another).take_over("key", root) is None


def test_a_stage_whose_objects_are_gone_is_made_anew(tmp_path):
    shared, root = stored(tmp_path), tmp_path / "one"
    shared.record("key", Artifact.of(root, write(root, "x", "1"), write(root, "y", "2")))
    (digest,) = shared.records.digests() - {sha256_path(root / "y")}
    shared.records.store.remove(f"objects/{digest[:2]}/{digest}")
    assert shared.take_over("key", tmp_path / "two") is None
    assert not (tmp_path / "two").exists()


def test_what_is_forgotten_is_not_taken_over(tmp_path):
    shared, root = stored(tmp_path), tmp_path / "one"
    shared.record("key", Artifact.of(root, write(root, "x", "1")))
    shared.records.forget()
    assert shared.take_over("key", tmp_path / "two") is None
    assert shared.records.digests() == set()
