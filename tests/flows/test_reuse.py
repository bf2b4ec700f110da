"""A second run does what the first has not done: cached, changed, damaged, elsewhere."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from flows.pipeline import pipeline
from tclora.adapter import read_adapter
from tclora.errors import JobError
from tclora.files import sha256_path
from tclora.jobs.run import LocalExecutor
from tclora.library.manifest import read_manifest, verify
from tclora.merge import merge
from tests.flows.examples import (
    ADAPTER_FILES,
    ALWAYS,
    environment,
    settings,
    stamps_of,
    written_by,
)

__all__ = ["environment", "settings"]
pytestmark = [
    pytest.mark.usefixtures("prefect_server", "environment"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module", autouse=True)
def in_process():
    """Jobs run in this process, in turn; those of their own are test_pipeline's."""
    lock = threading.Lock()

    def run_isolated(self, function, /, **arguments):
        with lock:
            return function(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExecutor, "run_isolated", run_isolated)
        yield


@pytest.fixture(scope="module")
def library(settings, environment, prefect_server, in_process):
    """Where the first run's library is; tests may damage it if they run the pipeline again."""
    return Path(pipeline(settings)["library"])


def test_a_second_run_takes_everything_from_the_cache(library, settings):
    written, outcome = written_by(library, settings)
    assert written == ALWAYS
    client = MlflowClient(outcome["mlflow_uri"])
    cached = client.search_runs(
        [outcome["mlflow_experiment"]], f"tags.`mlflow.parentRunId` = '{outcome['mlflow_run']}'"
    )
    # Trainings that come from the cache have their curve in the new run too.
    (nested,) = [run for run in cached if run.info.run_name == "cluster-0"]
    curve = client.get_metric_history(nested.info.run_id, "loss")
    history = json.loads((library / "training" / "cluster-0.json").read_text())
    assert [point.value for point in curve] == [record["loss"] for record in history]


def test_another_cp_rank_and_fewer_merges_train_nothing(library, settings):
    written, _ = written_by(
        library, settings, factorise={"rank": 1}, merge={"methods": ["tc-lora"]}
    )
    manifest = read_manifest(library)
    assert manifest.factors.rank == 1
    assert set(manifest.merges) == {"tc-lora", "tc-lora-unrefitted"}
    assert not (library / "merged" / "uniform").exists()
    assert {"factors.safetensors", "work/items/tc-lora.parquet"} < written
    assert not [name for name in written if name.startswith(("adapters/", "training/"))]
    assert not [name for name in written if "uniform" in name or "base" in name]
    back, _ = written_by(library, settings)  # as it was
    assert not [name for name in back if name.startswith(("adapters/", "training/"))]
    assert read_manifest(library).digests.keys() > manifest.digests.keys()


def test_a_deleted_adapter_alone_is_trained_again(library, settings):
    before = read_manifest(library).digests
    shutil.rmtree(library / "adapters" / "cluster-0")
    written, _ = written_by(library, settings)
    assert written == ALWAYS | {"training/cluster-0.json"} | {
        f"adapters/cluster-0/{file}" for file in ADAPTER_FILES
    }
    after = read_manifest(library).digests
    weights = "adapters/cluster-0/adapter_model.safetensors"
    assert after[weights] == before[weights]


def test_a_corrupt_merged_adapter_alone_is_built_again(library, settings):
    before = read_manifest(library).digests
    weights = library / "merged" / "uniform" / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    (problem,) = verify(library)
    assert problem.startswith("merged/uniform/adapter_model.safetensors differs from its digest")
    written, _ = written_by(library, settings)
    assert written == ALWAYS | {f"merged/uniform/{file}" for file in ADAPTER_FILES}
    assert read_manifest(library).digests == before


def test_the_cp_rank_can_be_chosen_by_recovery(library, settings):
    """After those that use the library: it leaves another rank behind."""
    _, outcome = written_by(library, settings, factorise={"target_recovery": 0.9})
    found = json.loads((library / "work" / "rank.json").read_text())
    assert found["reached"]
    assert found["curve"][str(found["rank"])] >= 0.9
    assert all(share < 0.9 for rank, share in found["curve"].items() if int(rank) < found["rank"])
    assert read_manifest(library).factors.rank == found["rank"]
    run = MlflowClient(outcome["mlflow_uri"]).get_run(outcome["mlflow_run"])
    assert run.data.params["factorise.target_recovery"] == "0.9"


def test_scales_are_tuned_on_the_sample_rows(library, settings):
    merging = {"methods": ["tc-lora", "task-arithmetic"], "scales": [0.1, 0.8]}
    before = stamps_of(library)
    staging = Path(pipeline(settings | {"merge": merging}, until="merge")["library"])
    assert stamps_of(library) == before
    library = staging
    found = json.loads((library / "work" / "scales" / "task-arithmetic.json").read_text())
    losses = {float(scale): loss for scale, loss in found["losses"].items()}
    assert losses.keys() >= {0.1, 0.8}  # and beyond, while the best is the last
    assert losses[found["scale"]] == min(losses.values()) < max(losses.values())
    assert not (library / "work" / "scales" / "tc-lora.json").exists()
    adapters = [read_adapter(library / "adapters" / name) for name in ("cluster-0", "cluster-1")]
    wanted = merge(adapters, "task-arithmetic", scale=found["scale"]).adapter.modules
    for name, factors in read_adapter(library / "merged" / "task-arithmetic").modules.items():
        assert torch.allclose(factors.delta(), wanted[name].delta(), atol=1e-6)


def test_a_run_with_a_store_goes_on_where_its_folder_is_not(settings, tmp_path, monkeypatch):
    """As on another machine after the first is gone: what was done before is not done again."""
    done, lock = [], threading.Lock()

    def run_isolated(self, function, /, **arguments):
        with lock:
            if function.__name__ in broken:
                raise JobError("the machine went away")
            done.append(function.__name__)
            return function(**arguments)

    monkeypatch.setattr(LocalExecutor, "run_isolated", run_isolated)
    output, store = tmp_path / "runs", tmp_path / "store"
    execution = {"store": f"file://{store}"}
    own = settings | {"output": str(output), "execution": execution, "publish_to": None}
    broken = {"collect_clusters"}
    with pytest.raises(JobError, match="the machine went away"):
        pipeline(own, until="merge")
    former, broken = set(done), set()
    assert "train_adapters" in former
    digests = {path: sha256_path(path) for path in (output / ".mine.staging/adapters").iterdir()}
    assert len(digests) == 3
    for folder in (output / ".mine.staging", Path(os.environ["TCLORA_CACHE"])):
        shutil.rmtree(folder)
    done.clear()
    pipeline(own, until="merge")
    assert done
    assert not former & set(done)
    assert {path: sha256_path(path) for path in digests} == digests
    assert list((store / "runs").rglob("*.json"))  # until a run has reached its end
