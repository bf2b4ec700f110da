import pytest

from tclora.errors import LibraryError
from tclora.files import sha256_path
from tclora.library.manifest import prune, read_manifest, size, verify, write_manifest


@pytest.fixture
def library(tmp_path):
    for name in ("adapters/a/weights", "adapters/b/weights", "clusters.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = ("adapters/a", "adapters/b", "clusters.parquet")
    write_manifest(tmp_path, {"name": "x"}, {name: sha256_path(tmp_path / name) for name in names})
    return tmp_path


def test_a_manifest_carries_values_versions_and_digests(library):
    values = read_manifest(library)
    assert values["name"] == "x"
    assert {"python", "torch", "peft", "tclora"} <= values["versions"].keys()
    assert list(values["digests"]) == ["adapters/a", "adapters/b", "clusters.parquet"]
    assert verify(library) == []


def test_verify_names_what_is_damaged(library):
    (library / "adapters/a/weights").write_text("Adapters/a/weights")
    (library / "clusters.parquet").unlink()
    assert verify(library) == [
        "adapters/a differs from its digest in library.json",
        "clusters.parquet is missing",
    ]


def test_nothing_is_written_before_its_files_are_there(library):
    before = (library / "library.json").read_bytes()
    with pytest.raises(LibraryError, match=r"merged/x, y must be on disk before the manifest"):
        write_manifest(library, {}, {"merged/x": "0", "adapters/a": "0", "y": "0"})
    assert (library / "library.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a tclora library: it has no library.json"),
        ("{", "must be JSON"),
        ('{"schema": 99}', "schema must be 1, got 99"),
        ("{}", "schema must be 1, got None"),
    ],
)
def test_an_unreadable_manifest_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "library.json").write_text(text)
    with pytest.raises(LibraryError, match=message):
        read_manifest(tmp_path)


def test_prune_removes_what_does_not_belong(library):
    (library / "adapters/own").mkdir()
    removed = prune(library, ("adapters", "merged"), ["adapters/a"])
    assert removed == ["adapters/b"]
    assert (library / "adapters/a").is_dir()
    assert (library / "adapters/own").is_dir()  # not in the manifest: the user's
    assert prune(library, ("adapters",), ["adapters/a"]) == []


def test_size(library):
    assert size(library / "adapters") == 2 * len("adapters/a/weights")
    assert size(library / "clusters.parquet") == len("clusters.parquet")
