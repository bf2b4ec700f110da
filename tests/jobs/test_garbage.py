import os
import time

import pytest
from typer.testing import CliRunner

from tclora.jobs.garbage import local_garbage, store_garbage
from tclora.jobs.parcel import Delivery, Packed
from tclora.jobs.records import JobRecords
from tclora.library.manifest import write_manifest
from tclora.model.place import cache_dir
from tclora.store.objects import Store
from tclora.store.stages import StageRecords
from tclora_cli.main import app
from tests.jobs import functions
from tests.library.examples import NAMES, describe, write_files

DAY = 86_400
PAST = time.time() - 30 * DAY
WEEK = 7 * DAY


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "cache"))


def aged(path):
    for part in [path, *path.rglob("*")]:
        os.utime(part, (PAST, PAST))


def written(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def places(found):
    return sorted(part.place for part in found)


def test_checkpoints_of_interrupted_runs_and_copies_not_used_lately_may_go(tmp_path):
    runs, cache = tmp_path / "runs", cache_dir()
    old = written(runs / ".mine.staging" / "work" / "checkpoints" / "c0" / "state").parent
    new = written(runs / ".mine.staging" / "work" / "checkpoints" / "c1" / "state").parent
    store = written(runs / ".mine.store" / "jobs" / "k1" / "parcel.json").parents[2]
    adapter = written(runs / ".mine.staging" / "adapters" / "c0" / "weights")
    other = written(runs / "mine" / "work" / "checkpoints" / "c0" / "state")
    copy = written(cache / "objects" / "ab" / "abcd")
    model = written(cache / "fetched" / "d1" / "weights").parent
    job = written(cache / "jobs" / "k1" / "0" / "rows").parents[1]
    embeddings = written(cache / "embeddings" / "e")  # made here, at a price
    aged(tmp_path)
    written(new / "state")
    found = list(local_garbage(runs, cache, time.time() - WEEK))
    assert places(found) == sorted(map(str, (old, copy, model, job, store)))
    assert {part.kind for part in found} == {"checkpoint", "cache", "job"}
    for part in found:
        part.remove()
    assert not any(path.exists() for path in (old, copy, model, job, store))
    assert all(path.exists() for path in (new, adapter, other, embeddings))


def sent(store, key, file):
    records = JobRecords(store, key)
    packed = Packed.of(functions.append, {"file": file, "text": "x"})
    records.send(packed.sent(store, file.parent / "s", source="s", beside=1, timeout=None))
    return records


def test_of_a_store_only_what_nothing_names_may_go(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    library = tmp_path / "runs" / "mine"
    write_files(library)
    write_manifest(library, describe(), NAMES)
    in_library = store.push(library / "adapters").below(tmp_path)
    given, made = written(tmp_path / "given", "1"), written(tmp_path / "made", "2")
    orphan = store.push(written(tmp_path / "orphan", "3"))
    records = sent(store, "aa" * 32, given)
    records.deliver(Delivery(attempt="1", result=None, changed={0: store.push(made)}))
    abandoned = sent(store, "bb" * 32, written(tmp_path / "given2", "4"))
    run, former = (StageRecords.of_library(store, tmp_path / name) for name in ("run", "former"))
    run.keep("cc", {"stage": written(tmp_path / "stage", "5")}, None)
    former.keep("cc", {"stage": written(tmp_path / "stage2", "6")}, None)
    aged(tmp_path / "store")
    records.tell("1", 0, [])  # still at work
    run.keep("dd", {}, None)
    before = time.time() - WEEK
    found = list(store_garbage(store, [library], before))
    wanted = [orphan, store.push(tmp_path / "given2"), store.push(tmp_path / "stage2")]
    assert places(found) == sorted(
        [f"objects/{t.file.digest[:2]}/{t.file.digest}" for t in wanted]
        + [f"jobs/{abandoned.key}", f"runs/{former.run}"]
    )
    for part in found:
        part.remove()
    assert list(store_garbage(store, [library], before)) == []
    assert records.delivery() is not None
    assert run.place("cc", tmp_path / "again", cache_dir()) is None  # what the stage had returned
    assert (tmp_path / "again" / "stage").read_text() == "5"
    for blob in in_library.values():
        store.get(blob, tmp_path / blob.digest)


def test_what_is_new_is_kept_whoever_needs_it(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    store.push(written(tmp_path / "under-way"))
    assert list(store_garbage(store, [], time.time() - WEEK)) == []


def test_the_command_lists_and_removes_when_told(tmp_path):
    state = written(tmp_path / "runs" / ".mine.staging" / "work" / "checkpoints" / "c0" / "state")
    store = Store(f"file://{tmp_path}/store")
    store.push(written(tmp_path / "orphan", "3"))
    aged(tmp_path)
    command = ["gc", "--output", str(tmp_path / "runs"), "--store", store.url]
    listed = CliRunner().invoke(app, command)
    assert listed.exit_code == 0, listed.output
    assert "1 of kind checkpoint" in listed.output
    assert "1 of kind object" in listed.output
    assert "may be removed (--delete does it)" in listed.output
    assert state.exists()
    removed = CliRunner().invoke(app, [*command, "--delete"])
    assert "1 of kind object, 0.0 MB, removed" in removed.output
    assert not state.exists()
    assert "nothing to remove" in CliRunner().invoke(app, command).output
