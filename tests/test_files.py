import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tclora.files import (
    atomic_path,
    link_path,
    parquet_batches,
    sha256_file,
    sha256_json,
    sha256_path,
    sort_metadata,
    write_json,
    write_text,
)


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def full_disk(monkeypatch):
    """Every write of text fails half-way, as on a disk that has just become full."""
    write = Path.write_text

    def fail(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", fail)


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "deep" / "down" / "a.txt"
    write_text(target, "old")
    with atomic_path(target) as fresh:
        fresh.write_text("new")
        assert target.read_text() == "old"
    assert content(tmp_path) == {"deep/down/a.txt": "new"}


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "left-over").write_text("x")
    with atomic_path(target) as fresh:
        fresh.mkdir()
        (fresh / "weights").write_text("w")
    assert content(tmp_path) == {"adapter/weights": "w"}


@pytest.mark.parametrize("folder", [False, True])
def test_an_exception_leaves_the_old_and_no_rubbish(tmp_path, folder):
    target = tmp_path / "thing"
    if folder:
        target.mkdir()
        (target / "a").write_text("old")
    else:
        target.write_text("old")
    before = content(tmp_path)

    def write_half():
        with atomic_path(target) as fresh:
            if folder:
                fresh.mkdir()
                (fresh / "a").write_text("half")
            else:
                fresh.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert content(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_full_disk_leaves_the_old(tmp_path, full_disk):
    target = tmp_path / "values.json"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device"):
        write_json(target, {"a": list(range(1000))})
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["values.json"]


def test_json_is_utf8_in_the_given_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": "ü", "a": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": "ü", "a": 1}
    assert text.index('"b"') < text.index('"a"')
    assert "ü" in text


def test_digest_of_a_known_text(tmp_path):
    (tmp_path / "a").write_text("abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == sha256_path(tmp_path / "a") == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a").write_text("2"),
        lambda folder: (folder / "a").rename(folder / "c"),
        lambda folder: (folder / "sub" / "b").unlink(),
        lambda folder: (folder / "new").write_text(""),
    ],
    ids=["content", "name", "removed", "added"],
)
def test_the_digest_of_a_folder_sees_every_change(tmp_path, change):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_text("1")
    (tmp_path / "sub" / "b").write_text("1")
    before = sha256_path(tmp_path)
    assert sha256_path(tmp_path) == before
    change(tmp_path)
    assert sha256_path(tmp_path) != before


def test_the_digest_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_path(tmp_path / "none")


def test_the_digest_of_a_value_ignores_the_order_of_keys():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])


def test_parquet_is_read_group_by_group(tmp_path):
    table = pa.table({"a": list(range(10)), "b": ["x"] * 10})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    file = pq.ParquetFile(tmp_path / "t.parquet")
    batches = list(parquet_batches(file, 3, ["a"]))
    assert [len(batch) for batch in batches] == [3, 1, 3, 1, 2]
    assert [value for batch in batches for value in batch.column("a").to_pylist()] == [*range(10)]
    assert batches[0].schema.names == ["a"]


def test_writing_one_of_two_linked_paths_anew_leaves_the_other(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "b").write_text("1")
    link_path(source, tmp_path / "deep" / "target")
    target = tmp_path / "deep" / "target" / "sub" / "b"
    assert target.samefile(source / "sub" / "b")
    write_text(target, "2")
    assert (source / "sub" / "b").read_text() == "1"


def test_sorted_metadata_say_what_they_said(tmp_path):
    file = tmp_path / "a.safetensors"
    told = {"z": 'a "quoted"\n line', "Größe": "\u2028 \x7f \x01 \\ 中", "a": ""}
    save_file({"x": np.arange(6.0), "y": np.ones(3, np.float32)}, file, metadata=told)
    sort_metadata(file)
    with safe_open(file, "np") as found:
        assert found.metadata() == told
        assert found.get_tensor("x").tolist() == list(range(6))
        assert found.get_tensor("y").tolist() == [1, 1, 1]
    sort_metadata(file)
    start = file.read_bytes()
    assert start.index(b'"Gr') < start.index(b'"a"') < start.index(b'"z"')
