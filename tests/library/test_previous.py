"""A library that the previous version wrote, of two clusters on a tiny model."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tclora.errors import LibraryError
from tclora.files import sha256_file
from tclora.library.contents import read_contents
from tclora.library.manifest import read_manifest, verify
from tclora.report import write_report
from tclora.route import read_library

PREVIOUS = Path(__file__).with_name("previous")
NAMES = ("cluster-0", "cluster-1")


@pytest.fixture
def library(tmp_path):
    return shutil.copytree(PREVIOUS, tmp_path / "library")


def test_it_is_of_the_previous_schema():
    assert json.loads((PREVIOUS / "library.json").read_text())["schema"] == 1


def test_it_opens():
    manifest = read_manifest(PREVIOUS)
    assert manifest.schema_version == 2
    assert set(manifest.training) == {"joint", *NAMES}
    assert sum(manifest.clustering.sizes) == manifest.profile["rows_train"]
    assert manifest.storage.routed == sum(f.stat().st_size for f in (PREVIOUS / "routed").iterdir())
    assert manifest.merges["tc-lora"].losses
    assert manifest.routed.coverage.keys() == {"test"}
    assert manifest.routed.method == manifest.settings.merge.primary == "tc-lora"


def test_it_verifies_by_folder(library):
    assert verify(library) == []
    weights = library / "merged" / "uniform" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert verify(library) == ["merged/uniform differs from its digest in library.json"]


def test_it_reports(library):
    page = write_report(library).read_text(encoding="utf-8")
    assert "tc-lora" in page
    assert page.count("<svg") == 7
    assert set(read_contents(library).losses) == {"joint", *NAMES}


def test_its_table_of_lm_eval_is_found_under_its_former_name(library):
    assert read_contents(library).lm_eval.empty
    file = library / "evaluation" / "harness.parquet"
    row = {"method": "tc-lora", "task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.01}
    pd.DataFrame([row]).to_parquet(file)
    assert read_contents(library).lm_eval.empty  # not listed
    manifest = json.loads((library / "library.json").read_text())
    manifest["digests"]["evaluation/harness.parquet"] = sha256_file(file)
    (library / "library.json").write_text(json.dumps(manifest))
    assert read_contents(library).lm_eval.to_dict("records") == [row]


def test_a_former_table_that_lies_beside_the_present_one_does_not_hide_it(library):
    """As in the staging area of a run that goes on from such a library."""
    row = {"method": "tc-lora", "task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.01}
    for name, value in (("harness", 0.1), ("lm_eval", 0.5)):
        frame = pd.DataFrame([row | {"value": value}])
        frame.to_parquet(library / "evaluation" / f"{name}.parquet")
    manifest = json.loads((library / "library.json").read_text())
    digest = sha256_file(library / "evaluation" / "lm_eval.parquet")
    manifest["digests"]["evaluation/lm_eval.parquet"] = digest
    (library / "library.json").write_text(json.dumps(manifest))
    assert read_contents(library).lm_eval.to_dict("records") == [row]


def test_its_routed_part_reads(library):
    found = read_library(library)
    assert found.gated.names == found.info.clusters == NAMES
    assert found.router.save().arrays["centroids"].shape[0] == 2


def test_a_routed_part_of_another_run_is_refused(library):
    info = library / "routed" / "routed.json"
    info.write_text(info.read_text() + "\n")  # as good in itself
    assert read_library(library / "routed").gated.names == NAMES
    with pytest.raises(LibraryError, match=r"routed differs from its digest .* run the pipeline"):
        read_library(library)
