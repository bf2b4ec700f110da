"""A study on a tiny model: cells, what they share, what is repeated, what a failed cell leaves."""

from collections import Counter

import pandas as pd
import pytest

from flows.study import study
from tclora.config import parse_config
from tclora.errors import ConfigError, JobError
from tclora.study.write import StudyLayout
from tests.flows.examples import alpaca_rows, write_rows
from tests.tasks.conftest import Inline

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(900)]
AXES = {
    "embed.model": ["all-minilm-l6-v2"],
    "cluster.method": ["kmeans", "gradients", "random"],
    "cluster.k": [2],
}
CALLS: Counter[str] = Counter()


class Counted(Inline):
    """Runs jobs in this process and counts them by what they do."""

    def run_isolated(self, function, /, **arguments):
        names = [request.name for request in arguments.get("requests", ())]
        CALLS.update([" ".join([function.__name__, *names])])
        return super().run_isolated(function, **arguments)


@pytest.fixture(autouse=True)
def environment(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("tasks.executing.LocalExecutor", Counted)
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    CALLS.clear()


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("study")
    return parse_config(
        {
            "name": "tiny",
            "output": str(folder / "runs"),
            "base_model": str(tiny_model_dir),
            "data": {"path": str(write_rows(folder, alpaca_rows())), "test_fraction": 0.2},
            "cluster": {"min_rows": 4},
            "train": {
                "r": 2, "batch_size": 8, "max_steps": 2, "template": "plain", "dtype": "float32",
                "target_modules": ["q_proj", "v_proj"],
            },
            "factorise": {"rank": 2, "ranks": [2], "n_starts": 1, "n_iter": 5},
            "merge": {"methods": ["tc-lora"], "refit_steps": 0, "sample_rows": 2},
            "evaluate": {"generate": False, "resamples": 50},
            "resources": {"jobs": 1},
        }
    )  # fmt: skip


def test_cells_share_what_they_have_in_common_and_nothing_is_repeated(config):
    found = study("clustering", config, AXES)
    layout = StudyLayout(config.library_dir.with_name("tiny-clustering"))
    assert found == {"folder": str(layout.folder), "summary": str(layout.summary)}
    table = pd.read_parquet(layout.parquet)
    assert set(table["cluster.method"]) == {"kmeans", "gradients", "random"}
    assert set(table["method"]) == {"own", "tc-lora", "routed"}
    assert set(table["n"]) == {11}
    compared = table[table["cluster.method"] != "random"]
    assert compared["difference"].notna().all()
    assert layout.plot.exists()
    assert "Differences are to the same method" in layout.summary.read_text()
    assert CALLS["train_adapters joint"] == 1  # on the same rows in every cell
    assert CALLS["compute_features"] == 1
    assert CALLS["evaluate_routed"] == 3
    CALLS.clear()
    study("clustering", config, AXES)
    assert not CALLS
    pd.testing.assert_frame_equal(pd.read_parquet(layout.parquet), table)
    study("clustering", config, {**AXES, "cluster.method": ["random"], "cluster.k": [2, 3]})
    assert CALLS["train_adapters joint"] == 0
    assert CALLS["evaluate_routed"] == 1


def test_cells_share_what_their_training_seeds_have_in_common(config):
    twice = config.model_copy(update={"name": "twice", "seeds": 2})
    axes = {**AXES, "cluster.method": ["kmeans", "random"]}
    study("clustering", twice, axes)
    layout = StudyLayout(config.library_dir.with_name("twice-clustering"))
    table = pd.read_parquet(layout.parquet)
    assert set(table["n"]) == {11}
    assert set(table["seeds"]) == {2}
    assert CALLS["train_adapters joint"] == 2  # once with each seed
    assert CALLS["evaluate_routed"] == 4
    assert not list(layout.folder.glob("[!.]*-seed1"))  # no run of a study publishes a library


def test_a_failed_cell_is_named_and_the_others_are_kept(config):
    axes = {"cluster.method": ["kmeans", "hdbscan"], "data.seed": [0, 1], "seed": [0, 1]}
    lonely = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"k": 2, "hdbscan_min_cluster_size": 40})
        }
    )
    with pytest.raises(JobError, match=r"4 of 8 cells failed[\s\S]*hdbscan_seed0_seed0: HDBS"):
        study("agreement", lonely, axes)
    layout = StudyLayout(config.library_dir.with_name("tiny-agreement"))
    table = pd.read_parquet(layout.parquet)
    assert table["between"].tolist() == ["seeds", "samples"]
    assert table["pairs"].tolist() == [2, 2]
    assert not CALLS  # nothing but the rows was looked at


def test_every_problem_is_told_before_anything_runs(config):
    axes = {"cluster.method": ["kmeans", "nearest"], "cluster.k": [2]}
    with pytest.raises(ConfigError, match=r"cluster\.method: clusterer must be a registered name"):
        study("clustering", config, {**axes, "embed.model": ["all-minilm-l6-v2"]})
    assert not CALLS
