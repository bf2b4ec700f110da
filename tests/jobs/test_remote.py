"""Jobs of another machine: here another cache folder, with nothing in common but the store."""

import json
import shutil
import threading

import pytest

from tclora.errors import JobError, StoreError
from tclora.jobs.call import result_type
from tclora.jobs.parcel import Packed
from tclora.jobs.records import JobRecords, Telling
from tclora.jobs.remote import accept, check_function, local_executor, perform
from tclora.jobs.usage import SAMPLE
from tclora.model.locate import model_digest
from tclora.model.place import ModelPlace, fetched_model
from tclora.store.objects import Store
from tclora.store.trees import Tree
from tests.jobs import functions

KEY = "ab" * 32


@pytest.fixture
def records(tmp_path):
    return JobRecords(Store(f"file://{tmp_path}/store", pauses=()), KEY)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Does jobs as another machine would."""

    def work(records, on_event=lambda _: None, attempt="1"):
        with monkeypatch.context() as patch:
            patch.setenv("TCLORA_CACHE", str(tmp_path / "worker"))
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            parcel = records.parcel()
            perform(records, parcel, attempt, on_event, local_executor(parcel))

    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "parent"))
    return work


def send(records, function, scratch, **arguments):
    packed = Packed.of(function, arguments)
    records.send(packed.sent(records.store, scratch, source="s", beside=1, timeout=60))
    return packed


def received(records, packed, function):
    delivery = records.delivery()
    accept(delivery, records, packed.places)
    return result_type(function).validate_python(delivery.unpacked(packed.places))


def test_files_travel_there_and_back(records, worker, tmp_path):
    home = tmp_path / "home"
    (home / "rows").mkdir(parents=True)
    (home / "rows" / "a.txt").write_text("seven!!")
    (home / "settings.json").write_text("{}")
    given = {
        "files": functions.Files(
            rows=home / "rows", target=home / "out" / "adapter", checkpoint=home / "work" / "c1"
        ),
        "log": home / "log.txt",
    }
    packed = send(records, functions.copy_rows, home / "work", **given)
    # No path of the sender but last names, and no file of its scratch folder.
    assert str(home) not in json.dumps(records.parcel().arguments)
    assert [slot.scratch for slot in records.parcel().slots].count(True) == 1
    events = []
    worker(records, events.append)
    assert not (home / "out").exists()
    found = received(records, packed, functions.copy_rows)
    assert found == functions.Copied(target=home / "out" / "adapter", bytes=7)
    assert (home / "out" / "adapter" / "sub" / "a.txt").read_text() == "seven!!"
    assert (home / "log.txt").read_text() == "done"
    assert not (home / "work").exists()
    assert [event for event in events if SAMPLE not in event] == [{"step": 1}]
    assert events[-1][SAMPLE][1]["process_memory_usage_megabytes"] > 1
    assert not [p for p in (tmp_path / "worker" / "jobs").iterdir() if p.is_dir()]


def test_a_job_sees_what_it_would_see_here(records, worker, tmp_path):
    log = tmp_path / "home" / "log.txt"
    log.parent.mkdir()
    log.write_text("what was there")
    packed = send(records, functions.append, tmp_path / "scratch", file=log, text=", and more")
    worker(records)
    assert log.read_text() == "what was there"
    received(records, packed, functions.append)
    assert log.read_text() == "what was there, and more"


def test_a_delivered_job_is_not_done_again(records, worker, tmp_path):
    log = tmp_path / "log.txt"
    packed = send(records, functions.append, tmp_path / "scratch", file=log, text="x")
    worker(records)
    worker(records, attempt="2")
    assert records.delivery().attempt == "1"
    received(records, packed, functions.append)
    assert log.read_text() == "x"
    records.forget()
    assert records.delivery() is None
    with pytest.raises(StoreError, match="must hold job abababababab"):
        worker(records)


def test_another_attempt_goes_on_from_the_scratch_folder(records, worker, tmp_path):
    target, scratch = tmp_path / "target.txt", tmp_path / "work"
    given = {"checkpoint": scratch / "c", "target": target}
    packed = send(records, functions.twice, scratch, **given)
    with pytest.raises(JobError, match="job twice: NonFiniteLossError: first attempt"):
        worker(records)
    assert records.delivery() is None
    worker(records, attempt="2")
    received(records, packed, functions.twice)
    assert target.read_text() == "half of it, the rest"


def test_a_model_folder_travels_once_and_keeps_its_name(records, worker, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    place = ModelPlace(location=str(folder), digest=model_digest(str(folder)))
    packed = send(records, functions.read_model, tmp_path / "scratch", model=place)
    shutil.rmtree(folder)
    worker(records)
    location, text = received(records, packed, functions.read_model)
    assert (location, text) == (str(folder), '{"a": 1}')
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "worker"))
    copy = fetched_model(place.digest)
    assert Tree.of(copy) == records.parcel().models[place.digest]
    assert place.here == str(copy)


def test_a_hub_id_stays_one(records, tmp_path):
    place = ModelPlace(location="org/model", digest="d" * 64)
    send(records, functions.read_model, tmp_path / "scratch", model=place)
    assert records.parcel().models == {}


@pytest.mark.parametrize("function", ["os:system", "subprocess:run", "tclora_evil.x:y", "x"])
def test_a_function_of_another_package_is_refused(function, monkeypatch):
    monkeypatch.delenv("TCLORA_PLUGINS", raising=False)
    with pytest.raises(JobError, match=r"a job's function must be of tclora.* TCLORA_PLUGINS"):
        check_function(function)
    check_function("tclora.train.engines:train_adapters")


def test_functions_of_plugins_are_known(monkeypatch):
    monkeypatch.setenv("TCLORA_PLUGINS", "tests.jobs.functions")
    check_function("tests.jobs.functions:append")


def test_events_are_left_in_parts_and_a_part_without_is_a_sign_of_life(records):
    seen = threading.Event()
    with Telling(records, "1", pause=0.05) as telling:
        telling.add({"step": 0})
        telling.add({"step": 1})
        while records.told("1", 3) is None:
            seen.wait(0.05)
        telling.add({"step": 2})
    parts = []
    while (part := records.told("1", len(parts))) is not None:
        parts.append(part)
    assert [event for part in parts for event in part] == [{"step": n} for n in range(3)]
    assert [] in parts
    assert records.told("2", 0) is None


def test_whoever_finds_a_delivery_finds_all_that_was_told(records, worker, tmp_path, monkeypatch):
    deliver, told = JobRecords.deliver, []

    def seen(of, delivery):
        told.extend(records.told("1", 0))
        deliver(of, delivery)

    monkeypatch.setattr(JobRecords, "deliver", seen)
    target = tmp_path / "target.txt"
    send(records, functions.slow, tmp_path, target=target, seconds=0.1, on_event=None)
    worker(records)
    assert told


def test_events_that_the_store_did_not_take_are_told_later(records, monkeypatch, caplog):
    tell, failures = JobRecords.tell, [OSError("503")]

    def once(*args):
        if failures:
            raise failures.pop()
        tell(*args)

    monkeypatch.setattr(JobRecords, "tell", once)
    with Telling(records, "1", pause=0.05) as telling:
        telling.add({"step": 0})
        while failures:
            pass
    assert records.told("1", 0) == [{"step": 0}]
    assert "did not take 1 events: 503" in caplog.text


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 21])
def test_how_many_parts_were_told_is_found_in_a_few_looks(tmp_path, count):
    records = JobRecords(Store(f"file://{tmp_path}"), "a" * 64)
    for part in range(count):
        records.tell("1", part, [])
    assert [records.parts("1", known) for known in (0, count // 2, count)] == [count] * 3
    # An attempt that is executed again goes on behind them: else it would seem silent.
    with Telling(records, "1", pause=60) as telling:
        telling.add({"step": 1})
    assert records.told("1", count) == [{"step": 1}]
