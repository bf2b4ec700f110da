import os
import shutil
from pathlib import Path

import pytest

from tclora.errors import LibraryError
from tclora.files import atomic_path, sha256_path
from tclora.library.manifest import write_manifest
from tclora.library.staging import begin, publish
from tests.library.examples import NAMES, describe, replace
from tests.library.staged import content, mark_of, prepare, root

__all__ = ["root"]


def test_the_first_run_begins_with_nothing_and_ends_with_a_library(tmp_path):
    root = tmp_path / "runs" / "demo"
    staging = begin(root)
    assert staging == tmp_path / "runs" / ".demo.staging"
    assert list(staging.iterdir()) == []
    assert not root.exists()
    publish(prepare(root, " first"), root)
    assert mark_of(root) == " first"
    assert [path.name for path in root.parent.iterdir()] == ["demo"]


def test_a_run_begins_with_what_the_library_holds(root):
    staging = begin(root)
    assert content(staging).keys() == content(root).keys() - {
        "library.json", "report.html", "notes.txt", "adapters/mine/weights",
    }  # fmt: skip
    assert (staging / "work/examples.parquet").samefile(root / "work/examples.parquet")


def test_a_run_leaves_the_finished_library_alone(root):
    before = content(root)
    staging = prepare(root, " second")
    with atomic_path(staging / "adapters/cluster-1") as fresh:
        fresh.mkdir()
        (fresh / "weights").write_text("third")
    shutil.rmtree(staging / "adapters/cluster-0")
    assert content(root) == before
    assert mark_of(root) == ""


def test_an_interrupted_run_is_gone_on_from(root):
    staging = prepare(root, " second")
    assert begin(root) == staging
    assert (staging / "clusters.parquet").read_text() == "rows second"
    assert not (staging / "library.json").exists()
    assert not (staging / "report.html").exists()


def test_a_new_library_takes_the_place_and_own_files_stay(root):
    inode = (root / "notes.txt").stat().st_ino
    staging = prepare(root, " second")
    (staging / "adapters/cluster-9").mkdir()  # left by an interrupted run with more clusters
    (staging / "adapters/cluster-9/weights").write_text("cluster-9")
    publish(staging, root)
    assert mark_of(root) == " second"
    assert not (root / "adapters/cluster-9").exists()
    assert (root / "adapters/mine/weights").read_text() == "my own"
    assert (root / "notes.txt").stat().st_ino == inode
    assert (root / "work/examples.parquet").read_text() == "examples second"
    assert [path.name for path in root.parent.iterdir()] == ["demo"]


def test_what_the_new_library_does_not_list_is_left_behind(root):
    staging = begin(root)
    write_manifest(staging, describe(), ["adapters/cluster-0", "clusters.parquet"])
    publish(staging, root)
    assert sorted(path.name for path in (root / "adapters").iterdir()) == ["cluster-0", "mine"]


def test_an_own_file_gives_way_to_the_new_library(root):
    (root / "adapters/cluster-1/weights").unlink()
    (root / "notes.txt").unlink()
    (root / "notes.txt").mkdir()
    (root / "notes.txt/page").write_text("a page")
    staging = prepare(root, " second")
    (staging / "notes.txt").write_text("notes of the run")
    (staging / "adapters/mine").write_text("a file in place of a folder")
    write_manifest(staging, describe(), [*NAMES, "notes.txt", "adapters/mine"])
    publish(staging, root)
    assert (root / "notes.txt").read_text() == "notes of the run"
    assert (root / "adapters/mine").is_file()


def test_a_folder_that_is_no_library_keeps_all_its_files(tmp_path):
    root = tmp_path / "demo"
    (root / "work").mkdir(parents=True)
    (root / "work/thesis.txt").write_text("years of work")
    publish(prepare(root, " first"), root)
    assert (root / "work/thesis.txt").read_text() == "years of work"
    assert mark_of(root) == " first"


def test_a_link_to_the_library_stays_one(root):
    link = root.parent.parent / "link"
    link.symlink_to(root)
    publish(prepare(link, " second"), link)
    assert link.is_symlink()
    assert mark_of(link) == mark_of(root) == " second"


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("linked", [True, False])
def test_what_the_library_has_lost_is_made_anew(root, monkeypatch, interrupted, linked):
    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    if interrupted:
        begin(root)
    shutil.rmtree(root / "adapters/cluster-0")
    (root / "adapters/cluster-1/weights").write_text("changed in place")
    replace(root / "clusters.parquet", "put there instead")
    staging = begin(root)
    assert set(content(staging)) == {"adapters/cluster-1/config", "work/examples.parquet"}


def test_what_an_interrupted_run_has_made_anew_is_kept(root):
    staging = begin(root)
    replace(staging / "clusters.parquet", "made anew")
    (root / "clusters.parquet").unlink()
    assert (begin(root) / "clusters.parquet").read_text() == "made anew"


def test_a_lost_folder_of_the_previous_version_is_made_anew(tmp_path):
    previous = Path(__file__).with_name("previous")
    root = shutil.copytree(previous, tmp_path / "demo")
    staging = begin(root)
    assert (staging / "adapters/joint").is_dir()
    shutil.rmtree(root / "adapters/joint")
    weights = root / "merged/uniform/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert begin(root) == staging
    assert not (staging / "adapters/joint").exists()
    assert not (staging / "merged/uniform").exists()
    assert sha256_path(staging / "merged/tc-lora") == sha256_path(root / "merged/tc-lora")


def test_without_hard_links_files_are_copied(root, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    staging = begin(root)
    assert not (staging / "clusters.parquet").samefile(root / "clusters.parquet")
    publish(prepare(root, " second"), root)
    assert mark_of(root) == " second"
    assert (root / "notes.txt").read_text() == "my notes"


def test_an_unfinished_library_is_not_published(root):
    before = content(root)
    staging = prepare(root, " second")
    (staging / "adapters/cluster-1/weights").unlink()
    with pytest.raises(LibraryError, match="adapters/cluster-1/weights must be on disk before"):
        publish(staging, root)
    staging = begin(root)
    with pytest.raises(LibraryError, match=r"has no library\.json"):
        publish(staging, root)
    assert content(root) == before


def test_a_file_in_the_librarys_place_is_named(tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(LibraryError, match="demo must be a folder, but is a file; move it away"):
        begin(tmp_path / "demo")


def refuse(*arguments, **options):
    raise OSError("no hard links here")
