"""One store on a disk, one on S3's protocol where its packages are installed."""

import contextlib
import importlib.util
import threading
import time
from pathlib import Path

import pytest

from tclora.errors import ConfigError, StoreError
from tclora.store.cache import Cache
from tclora.store.objects import Store
from tclora.store.trees import Blob, Tree

S3 = all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask"))


@contextlib.contextmanager
def s3_server(patch):
    """A real server of S3's protocol on the loopback, with one bucket."""
    from botocore.session import get_session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    client = get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield "s3://bucket/pre/fix"
    server.stop()


@pytest.fixture(
    params=["file", pytest.param("s3", marks=pytest.mark.skipif(not S3, reason="no s3fs, moto"))]
)
def store(request, tmp_path, monkeypatch):
    if request.param == "file":
        yield Store(f"file://{tmp_path}/store", pauses=())
        return
    with s3_server(monkeypatch) as url:
        yield Store(url, pauses=())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 400)
    (folder / "sub" / "config.json").write_text("{}")
    return folder


def test_what_is_pushed_comes_back_elsewhere(store, folder, tmp_path):
    store.check()
    tree = store.push(folder)
    assert store.push(folder / "none") is None
    target = tmp_path / "there" / "adapter"
    target.mkdir(parents=True)
    (target / "old").write_text("goes")
    Cache(tmp_path / "cache", store).place(tree, target)
    assert Tree.of(target) == tree == Tree.of(folder)
    single = tmp_path / "there" / "weights"
    Cache(tmp_path / "cache", store).place(store.push(folder / "weights"), single)
    assert single.read_bytes() == (folder / "weights").read_bytes()
    names = dict(store.names("objects"))
    assert len(names) == 2  # the same bytes once, and nothing half written
    assert all(name.split("/")[-1] in {b.digest for b in tree.files.values()} for name in names)


def test_records_are_written_read_and_removed(store):
    assert store.read("jobs/a/parcel.json") is None
    store.write("jobs/a/parcel.json", b"1")
    store.write("jobs/a/parcel.json", b"22")
    store.write("jobs/a/told/x/000000.json", b"[]")
    assert store.read("jobs/a/parcel.json") == b"22"
    assert dict(store.names("jobs/a")) == {"jobs/a/parcel.json": 2, "jobs/a/told/x/000000.json": 2}
    store.remove("jobs/a")
    assert store.read("jobs/a/parcel.json") is None
    store.remove("jobs/a")  # nothing to do


def test_an_object_is_fetched_once_and_again_when_its_copy_was_changed(store, folder, tmp_path):
    tree = store.push(folder / "weights")
    cache, target = Cache(tmp_path / "cache", store), tmp_path / "target"
    cache.place(tree, target)
    name = f"objects/{tree.file.digest[:2]}/{tree.file.digest}"
    store.remove(name)
    cache.place(tree, target)  # from the cache alone
    target.write_bytes(b"changed in place: it is a link")
    with pytest.raises(StoreError, match="must hold object"):
        cache.place(tree, tmp_path / "other")
    store.push(folder / "weights")
    cache.place(tree, tmp_path / "other")
    assert Tree.of(tmp_path / "other") == tree


def test_other_bytes_under_a_digest_are_refused(store, tmp_path):
    digest = "ab" * 32
    store.write(f"objects/ab/{digest}", b"not what its name says")
    with pytest.raises(StoreError, match=r"object abababababab must have its digest, got"):
        Cache(tmp_path / "cache", store).place(
            Tree(file=Blob(digest=digest, size=22)), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_many_threads_may_push_and_fetch_the_same(store, folder, tmp_path):
    def work(number):
        tree = store.push(folder)
        Cache(tmp_path / "cache", store).place(tree, tmp_path / f"copy{number}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {Tree.of(tmp_path / f"copy{n}").size for n in range(4)} == {Tree.of(folder).size}


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    with pytest.raises(StoreError, match=r"must have 1000\d+\.\d\d GB free .* TCLORA_CACHE"):
        Cache(tmp_path / "cache", store).place(
            Tree(file=Blob(digest="0" * 64, size=10**20)), tmp_path / "x"
        )


def test_what_fails_for_a_while_is_tried_again(tmp_path, folder, monkeypatch):
    store = Store(f"file://{tmp_path}/store", pauses=(0, 0))
    upload, failures = store._fs.put_file, [OSError("503"), TimeoutError("slow")]

    def put_file(*args):
        if failures:
            raise failures.pop()
        upload(*args)

    monkeypatch.setattr(store._fs, "put_file", put_file)
    tree = store.push(folder / "weights")
    assert not failures
    Cache(tmp_path / "cache", store).place(tree, tmp_path / "target")
    failures += [OSError("503")] * 3
    with pytest.raises(OSError, match="503"):
        store.push(folder / "sub")


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    store = Store(f"file://{tmp_path}/store", pauses=())
    with pytest.raises(StoreError, match=r"store file://.* must be writable, but"):
        store.check()


def test_a_scheme_without_its_package_names_the_extra(monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot be opened: .*install tclora\[s3\]"):
        Store("nosuchscheme://bucket/a")


def test_half_an_upload_is_no_object(tmp_path, folder, monkeypatch):
    store = Store(f"file://{tmp_path}/store", pauses=())

    def half(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("the machine went away")

    monkeypatch.setattr(store._fs, "put_file", half)
    with pytest.raises(OSError, match="went away"):
        store.push(folder / "weights")
    monkeypatch.undo()
    tree = Tree.of(folder / "weights")
    assert store._size(f"objects/{tree.file.digest[:2]}/{tree.file.digest}") is None
    store.push(folder / "weights")
    Cache(tmp_path / "cache", store).place(tree, tmp_path / "target")


@pytest.mark.skipif(not S3, reason="no s3fs, moto")
def test_missing_credentials_are_told_at_once(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="check the place and its credentials"):
        Store("s3://bucket/x", pauses=(30,)).check()
    assert time.monotonic() - begin < 20
