import json
import shutil

import pytest

from tclora.errors import LibraryError
from tclora.library.layout import Layout
from tclora.library.manifest import check_listed, read_manifest, size, verify, write_manifest
from tests.library.examples import NAMES, describe, write_files


@pytest.fixture
def library(tmp_path):
    write_files(tmp_path)
    write_manifest(tmp_path, describe(), NAMES)
    return tmp_path


def edit(library, **changes):
    file = library / "library.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_written_comes_back(library):
    manifest = read_manifest(library)
    assert manifest.schema_version == 2
    assert manifest.merges["uniform"].bytes == 16
    assert manifest.settings.merge.primary == "uniform"
    assert manifest.config == describe().config
    assert {"python", "torch", "peft", "tclora"} <= manifest.versions.keys()
    assert next(iter(json.loads((library / "library.json").read_text()))) == "schema"


def test_every_file_of_a_folder_is_listed(library):
    assert list(read_manifest(library).digests) == [
        "adapters/cluster-0/config", "adapters/cluster-0/weights",
        "adapters/cluster-1/config", "adapters/cluster-1/weights", "clusters.parquet",
    ]  # fmt: skip
    assert verify(library) == []


def test_verify_names_the_file_that_differs(library):
    (library / "adapters/cluster-0/weights").write_text("others")
    (library / "clusters.parquet").unlink()
    assert verify(library) == [
        "adapters/cluster-0/weights differs from its digest in library.json",
        "clusters.parquet is missing",
    ]


def test_nothing_is_written_before_its_files_are_there(library):
    before = (library / "library.json").read_bytes()
    with pytest.raises(LibraryError, match=r"merged/x, y must be on disk before the manifest"):
        write_manifest(library, describe(), ["merged/x", "adapters/cluster-0", "y"])
    assert (library / "library.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a tclora library: it has no library.json; run the pipeline to its end"),
        ("{", "must be JSON, but .*; restore it, or remove it and run the pipeline again"),
        ("[]", "schema must be 1 or 2, got None; open it with the version"),
        ('{"schema": 99}', "schema must be 1 or 2, got 99; open it with the version"),
        ("{}", "schema must be 1 or 2, got None"),
    ],
)
def test_an_unreadable_manifest_says_why(tmp_path, text, message):
    if text is not None:
        (tmp_path / "library.json").write_text(text)
    with pytest.raises(LibraryError, match=message):
        read_manifest(tmp_path)


def test_a_file_in_place_of_the_library_is_named(library):
    with pytest.raises(LibraryError, match=r"clusters\.parquet is not a tclora library"):
        read_manifest(library / "clusters.parquet")


def test_what_is_missing_or_unknown_is_named(library):
    edit(library, factors={"rank": 2}, mood="good", config={"seed": 0})
    with pytest.raises(LibraryError) as caught:
        read_manifest(library)
    for name in ("factors.explained_variance", "mood", "config", "restore it"):
        assert name in str(caught.value)


def test_a_file_is_checked_before_it_is_read(library):
    manifest, layout = read_manifest(library), Layout(library)
    check_listed(library, manifest, layout.adapter("cluster-0"))
    with pytest.raises(LibraryError, match=r"library\.json has no merged/uniform"):
        check_listed(library, manifest, layout.merged("uniform"))
    shutil.copy(layout.clusters, layout.adapter("cluster-0") / "weights")
    with pytest.raises(LibraryError, match=r"adapters/cluster-0/weights differs .* run the pipe"):
        check_listed(library, manifest, layout.adapter("cluster-0"))
    check_listed(library, manifest, layout.adapter("cluster-1"))


def test_size(library):
    assert size(library / "adapters/cluster-0") == len("cluster-0 config") + len("cluster-0")
    assert size(library / "clusters.parquet") == len("rows")
