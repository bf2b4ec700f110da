"""Stages called as plain functions, their jobs in this process."""

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from prefect.logging import disable_run_logger

from tasks.artifact import Artifact
from tasks.progress import JobProgress
from tasks.traces import trace_into
from tasks.tracking import open_run
from tasks.where import Where
from tclora.adapter import write_adapter
from tclora.config import parse_config
from tclora.jobs.run import LocalExecutor
from tclora.library.layout import Layout
from tclora.model.base import Base
from tests.route.conftest import draw_adapters


class Inline(LocalExecutor):
    """Runs jobs in this process, where they can be followed."""

    def run_isolated(self, function, /, **arguments):
        return function(**arguments)


@pytest.fixture(autouse=True)
def no_run_logger():
    with disable_run_logger():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An MLflow run in a store of its own."""
    return open_run(
        parse_config({"name": "trial", "output": str(tmp_path_factory.mktemp("store"))}), "run", {}
    )


@pytest.fixture(scope="session")
def trace_store(tmp_path_factory):
    """A store for traces; making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('traces')}/mlflow.db"


@pytest.fixture
def traced(trace_store, monkeypatch):
    """Traces go to that store; MLflow itself sets the experiment in the environment."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    mlflow.set_tracking_uri(trace_store)
    trace_into("traces")
    yield
    mlflow.flush_trace_async_logging()
    mlflow.set_tracking_uri(None)
    assert not Path("mlruns").exists()


@pytest.fixture
def where(tmp_path):
    return Where(Layout(tmp_path / "staging"), None, Inline(), JobProgress())


@pytest.fixture
def base(tiny_model_dir):
    return Base(
        location=str(tiny_model_dir), digest="d", dtype="float32", template="plain", max_tokens=64
    )


@pytest.fixture
def adapters(tiny_model, where):
    """Three adapters of the tiny model in the staging area, as trainings would leave them."""
    made = {}
    for adapter in draw_adapters(tiny_model, scale=0.2):
        folder = where.layout.adapter(adapter.name)
        write_adapter(adapter, folder)
        made[adapter.name] = Artifact.of(where.layout.root, folder)
    return made


def write_rows(where: Where, name: str, rows: list[tuple[str, str]], **columns) -> Artifact:
    """Write rows of prompt and response below the staging area."""
    file: Path = where.layout.rows(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=["prompt", "response"])
    frame.assign(**columns).to_parquet(file)
    return Artifact.of(where.layout.root, file, info={"rows": len(rows)})


def cluster_row_files(where: Where) -> dict[str, Artifact]:
    """Rows of the three clusters of `adapters`."""
    return {
        f"cluster-{k}": write_rows(
            where, f"cluster-{k}", [(f"say {k} {i}", "abc"[k] * 3) for i in range(4)]
        )
        for k in range(3)
    }
