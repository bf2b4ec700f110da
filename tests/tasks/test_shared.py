"""What runs on several libraries have in common is linked, not made again."""

import logging
import shutil
from pathlib import Path

import pytest
from prefect import flow

from tasks import keys
from tasks.artifact import Artifact, Artifacts
from tasks.keys import stage
from tasks.progress import JobProgress
from tasks.shared import LinkedStages, StoredStages, forget_stages, stored_stages
from tasks.where import Where
from tclora.config import load_config
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


def test_a_record_of_another_version_is_none(tmp_path):
    shared, root = stored(tmp_path), tmp_path / "one"
    shared.record("key", Artifact.of(root, write(root, "x", "1"), metrics={"m": float("nan")}))
    shared.records.store.write(f"runs/{shared.records.run}/other.json", b'{"files": 1}')
    shared.records.store.write(f"runs/{shared.records.run}/new.json.0a.part", b"{")
    assert shared.take_over("key", tmp_path / "two") is None  # JSON has no such figure
    assert shared.take_over("other", tmp_path / "two") is None
    assert shared.records.digests() == {sha256_path(root / "x")}


@pytest.mark.usefixtures("prefect_server")
def test_a_store_that_fails_costs_a_run_nothing_but_what_it_keeps(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keys, "get_run_logger", lambda: logging.getLogger("keys"))
    place = tmp_path / "store"
    place.write_text("no folder")
    records = StageRecords.of_library(Store(f"file://{place}", pauses=()), tmp_path / "library")
    made = shouting(tmp_path / "a", "hello", 1, [StoredStages(records)])
    assert (made.path / "shout").read_text() == "HELLO"
    assert "shout: nothing is taken over: " in caplog.text
    assert "shout: what it has made is not kept for a run on another machine: " in caplog.text


@pytest.mark.usefixtures("prefect_server")
def test_what_one_place_has_is_recorded_in_the_others(tmp_path):
    """A cell of a study that takes a stage over can go on on another machine too."""
    folder, places = LinkedStages(tmp_path / "shared"), [stored(tmp_path / name) for name in "ab"]
    first = shouting(tmp_path / "one", "hello", 1, [folder, places[0]])
    second = shouting(tmp_path / "two", "hello", 1, [folder, places[1]])
    assert second.files == first.files
    assert all(len(place.records.digests()) == 1 for place in places)


def test_where_the_finished_library_is_nothing_is_taken_from_the_store(tmp_path):
    settings = {"name": "mine", "output": str(tmp_path / "runs"), "train": {"dtype": "float32"}}
    assert stored_stages(load_config(settings)) == []
    config = load_config({**settings, "execution": {"store": f"file://{tmp_path}/store"}})
    (place,) = stored_stages(config)
    root = tmp_path / "one"
    place.record("key", Artifact.of(root, write(root, "x", "1")))
    assert place.take_over("key", tmp_path / "two") is not None
    write(tmp_path / "runs" / "mine", "library.json", "{}")
    (place,) = stored_stages(config)
    assert place.take_over("key", tmp_path / "three") is None
    forget_stages(config)
    assert place.records.digests() == set()


def test_what_is_forgotten_is_not_taken_over(tmp_path):
    shared, root = stored(tmp_path), tmp_path / "one"
    shared.record("key", Artifact.of(root, write(root, "x", "1")))
    shared.records.forget()
    assert shared.take_over("key", tmp_path / "two") is None
    assert shared.records.digests() == set()
