"""Libraries of which no report can be written: the file, and what is wrong with it."""

import json
import re

import pandas as pd
import pytest

from tclora.errors import LibraryError
from tclora.library.contents import read_contents
from tclora.report import write_report
from tests.report.library import edit_manifest, seal


@pytest.mark.parametrize("name", ["library.json", "clusters.parquet", "explained_variance.parquet"])
def test_missing_mandatory_file_is_named(library, name):
    (library / name).unlink()
    with pytest.raises(LibraryError, match=re.escape(name)):
        write_report(library)


def test_listed_file_is_mandatory(library):
    (library / "evaluation/recovery.parquet").unlink()
    with pytest.raises(LibraryError, match=r"evaluation/recovery\.parquet is missing; put it back"):
        write_report(library)


@pytest.mark.parametrize(
    "name",
    ["clusters.parquet", "evaluation/items.parquet", "routing.parquet", "training/cluster-0.json"],
)
def test_a_file_of_another_run_is_refused(library, name):
    with (library / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(LibraryError, match=rf"{name} differs .*; put it back, or run the pipeline"):
        write_report(library)


def test_a_file_that_is_not_listed_is_not_read(library):
    row = {"method": "tc-lora", "task": "arc<easy>", "metric": "acc", "value": 0.5, "stderr": 0.01}
    pd.DataFrame([row]).to_parquet(library / "evaluation/lm_eval.parquet")
    assert read_contents(library).lm_eval.empty


def test_manifest_of_another_schema_is_refused(library):
    edit_manifest(library, schema=3)
    with pytest.raises(LibraryError, match="schema must be 1 or 2, got 3"):
        write_report(library)


def test_incomplete_manifest_is_refused(library):
    manifest = json.loads((library / "library.json").read_text())
    del manifest["factors"]
    (library / "library.json").write_text(json.dumps(manifest))
    with pytest.raises(LibraryError, match="factors"):
        write_report(library)


@pytest.mark.parametrize("name", ["library.json", "clusters.parquet"])
def test_unreadable_file_is_named(library, name):
    (library / name).write_text("not what it should be")
    if name != "library.json":
        seal(library)
    with pytest.raises(LibraryError, match=re.escape(name)):
        write_report(library)


def test_missing_column_is_named(library):
    path = library / "clusters.parquet"
    pd.read_parquet(path).drop(columns="similarity").to_parquet(path)
    seal(library)
    with pytest.raises(LibraryError, match=r"clusters\.parquet.*similarity"):
        write_report(library)
