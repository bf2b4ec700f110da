import time

import pytest

from tclora.errors import ConfigError, LibraryError, StoreError
from tclora.jobs.garbage import local_garbage, store_garbage
from tclora.library.manifest import verify, write_manifest
from tclora.library.published import library_folder, put_library
from tclora.model.place import cache_dir
from tclora.store.objects import Store
from tests.library.examples import NAMES, describe, write_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/store"


def library(tmp_path, mark=""):
    root = tmp_path / "runs" / "mine"
    write_files(root, mark)
    write_manifest(root, describe(), NAMES)
    (root / "report.html").write_text("report" + mark)
    (root / "notes.txt").write_text("a user's own")
    return root


def contents(root):
    return {f.relative_to(root).as_posix(): f.read_text() for f in root.rglob("*") if f.is_file()}


def test_a_library_comes_back_as_it_was_without_what_is_not_its_own(tmp_path, url):
    root = library(tmp_path)
    place = put_library(root, url)
    assert place == f"{url}/mine"
    found = library_folder(place)
    wanted = contents(root)
    del wanted["notes.txt"]
    assert contents(found) == wanted
    assert verify(found) == []


def test_a_folder_is_itself(tmp_path):
    assert library_folder(tmp_path / "x") == tmp_path / "x"
    assert library_folder(str(tmp_path)) == tmp_path


def test_a_reader_finds_the_former_library_until_the_new_one_is_whole(tmp_path, url, monkeypatch):
    place = put_library(library(tmp_path), url)
    before = contents(library_folder(place))
    root = library(tmp_path, " new")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            put_library(root, url)
    assert contents(library_folder(place)) == before
    put_library(root, url)
    after = contents(library_folder(place))
    assert after["adapters/cluster-0/weights"] == "cluster-0 new"
    assert after["report.html"] == "report new"


def test_a_copy_that_was_damaged_is_mended(tmp_path, url):
    place = put_library(library(tmp_path), url)
    copy = library_folder(place)
    (copy / "clusters.parquet").unlink()
    (copy / "clusters.parquet").write_text("else")
    assert contents(library_folder(place))["clusters.parquet"] == "rows"


def test_an_object_that_the_store_has_lost_is_named(tmp_path, url):
    place = put_library(library(tmp_path), url)
    store = Store(url)
    name = next(name for name, _ in store.names("objects"))
    store.remove(name)
    with pytest.raises(StoreError, match=f"must hold object {name.split('/')[-1][:12]}"):
        library_folder(place)


def test_a_library_that_lacks_a_file_is_not_published(tmp_path, url):
    root = library(tmp_path)
    (root / "clusters.parquet").unlink()
    with pytest.raises(LibraryError, match=r"clusters\.parquet must be there"):
        put_library(root, url)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("yours", LibraryError, r"has no yours; it has: mine"),
        ("../mine", ConfigError, r"must not climb up"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, url, name, error, message):
    put_library(library(tmp_path), url)
    with pytest.raises(error, match=message):
        library_folder(f"{url}/{name}")


def test_a_url_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="a store's URL and a name"):
        library_folder("s3://bucket")


def test_a_sweep_keeps_what_published_libraries_need_and_no_copies(tmp_path, url):
    place = put_library(library(tmp_path), url)
    later = time.time() + 60
    assert list(store_garbage(Store(url), [], later)) == []
    copy = library_folder(place)
    found = list(local_garbage(tmp_path / "runs", cache_dir(), later))
    assert str(copy) in {part.place for part in found}
    for part in found:
        part.remove()
    assert verify(library_folder(place)) == []
