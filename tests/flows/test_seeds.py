"""Several training seeds as one setting: a library each, one evaluation over all of them."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from flows.pipeline import pipeline
from tclora.adapter import read_adapter
from tclora.config import load_config
from tclora.evaluate.recovery import recovery
from tclora.library.layout import Layout
from tclora.library.manifest import verify
from tests.flows.examples import alpaca_rows, environment, write_rows
from tests.tasks.conftest import Inline

__all__ = ["environment"]
pytestmark = [
    pytest.mark.usefixtures("prefect_server", "environment"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("seeds")
    return {
        "name": "mine", "output": str(folder / "runs"), "base_model": str(tiny_model_dir),
        "seeds": 2,
        "data": {"path": str(write_rows(folder, alpaca_rows())), "test_fraction": 0.2},
        "cluster": {"k": 2, "min_rows": 4},
        "train": {
            "r": 2, "lr": 2e-2, "template": "plain", "target_modules": ["q_proj", "down_proj"],
            "dtype": "float32", "joint": False,
        },
        "factorise": {"rank": 2, "ranks": [1], "n_starts": 1, "n_iter": 5},
        "evaluate": {"generate": False, "resamples": 50},
        "merge": {"methods": ["uniform", "svd"], "primary": "uniform", "sample_rows": 0},
        "route": {"enabled": False},
        "resources": {"jobs": 1},
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def in_process():
    """Jobs run in this process, in turn; those of their own are test_pipeline's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.executing.LocalExecutor", Inline)
        yield


@pytest.fixture(scope="module")
def finished(settings, environment, prefect_server, in_process):
    return pipeline(settings)


@pytest.fixture(scope="module")
def layouts(finished):
    first = Path(finished["library"])
    return [Layout(first), Layout(first.with_name("mine-seed1"))]


def test_every_seed_has_a_library_of_its_own(layouts):
    for layout in layouts:
        assert verify(layout.root) == []
    one, other = (read_adapter(layout.adapter("cluster-0")).modules for layout in layouts)
    assert not any(torch.equal(one[name].B, other[name].B) for name in one)


def test_what_comes_before_training_is_shared(layouts):
    for place in ("embeddings", "examples", "held_out", "clusters", "centroids"):
        one, other = (getattr(layout, place) for layout in layouts)
        assert one.samefile(other)


def test_the_evaluation_is_over_all_seeds(layouts):
    both, alone = (pd.read_parquet(layout.evaluation.items) for layout in layouts)
    assert set(both["seed"]) == {0, 1}
    assert "seed" not in alone
    second = both[both["seed"] == 1].drop(columns="seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(second, alone)
    base = both[both["method"] == "base"].groupby("id")["nll"].nunique()
    assert (base == 1).all()
    summary = pd.read_parquet(layouts[0].evaluation.summary)
    assert (summary["seeds"] == 2).all()
    assert summary[summary["group_kind"] == "all"]["n"].tolist() == [11] * 4
    found = pd.read_parquet(layouts[0].evaluation.recovery)
    pd.testing.assert_frame_equal(found, recovery(both, resamples=50))
    winners = pd.read_parquet(layouts[0].evaluation.winners)
    assert (winners["seeds"] == 2).all()
    assert "2 training seeds" in layouts[0].report.read_text()


def test_mlflow_has_figures_with_intervals_and_numbers(finished):
    run = MlflowClient(finished["mlflow_uri"]).get_run(finished["mlflow_run"])
    figures = run.data.metrics
    assert figures["uniform/seeds"] == 2
    assert figures["uniform/test/nll_n"] == 11
    assert figures["uniform/test/nll_low"] < figures["uniform/test/nll"]
    assert figures["uniform/test/nll"] < figures["uniform/test/nll_high"]
    assert {"uniform/recovery/mean", "uniform/recovery/mean_low"} <= set(figures)


def test_another_run_trains_nothing(settings, layouts):
    files = [layout.adapter("cluster-1") / "adapter_model.safetensors" for layout in layouts]
    before = [file.stat().st_ino for file in files]
    pipeline(settings)
    assert [file.stat().st_ino for file in files] == before


def test_replicas_count_on_from_the_training_seed():
    config = load_config({"name": "x", "seed": 3, "training_seed": 7, "seeds": 3})
    assert [(c.name, c.of_training, c.seed, c.seeds) for c in config.replicas()] == [
        ("x-seed8", 8, 3, 1), ("x-seed9", 9, 3, 1),
    ]  # fmt: skip
    assert load_config({"name": "x", "seed": 3}).of_training == 3
    assert load_config({"name": "x"}).replicas() == []
