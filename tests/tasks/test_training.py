"""The training stage: adapters, curves in the library and in MLflow, checkpoints as asked for."""

import json
from typing import ClassVar

import pytest

from tasks import training
from tasks.artifact import Artifact
from tasks.progress import JobProgress
from tasks.where import Where
from tclora.adapter import read_adapter
from tclora.config import AdapterConfig
from tclora.errors import JobError
from tclora.jobs.usage import Sample
from tclora.model.token_file import SUFFIX, write_tokens
from tests.tasks.conftest import Inline, cluster_row_files


class Noted(Inline):
    """Notes what a job is given."""

    given: ClassVar[dict] = {}

    def run_isolated(self, function, /, **arguments):
        self.given.update(arguments)
        return function(**arguments)


@pytest.fixture
def logged(where, run, monkeypatch):
    monkeypatch.setattr(training, "current_key", lambda: "0" * 64)
    return Where(where.layout, run, Noted(), JobProgress(), checkpoint_steps=3)


def tokenised(part, base, where):
    """Rows as `divide` writes them: texts, and tokens."""
    file = part.path.with_suffix(SUFFIX)
    write_tokens([base.load().encode(part.path)], file)
    return Artifact.of(where.layout.root, part.path, file, info=part.info)


def train(rows, base, where, **values):
    rows = {name: tokenised(part, base, where) for name, part in rows.items()}
    config = AdapterConfig(r=2, batch_size=2, epochs=2, target_modules=("q_proj",), **values)
    seeds = dict.fromkeys(rows, 0)
    return training.train.fn("both", rows, seeds, "separate", config, base, 0, where)


def test_every_adapter_has_its_files_its_curve_and_its_run(logged, base):
    rows = {n: part for n, part in cluster_row_files(logged).items() if n != "cluster-2"}
    trained = train(rows, base, logged, lr=1e-2)
    assert set(trained) == {"cluster-0", "cluster-1"}
    client = logged.run.client
    for name, part in trained.items():
        assert {f.rank for f in read_adapter(part.path).modules.values()} == {2}
        history = json.loads(logged.layout.training(name).read_text())
        assert [record["step"] for record in history] == [0, 1, 2, 3]
        assert part.metrics["train/steps"] == part.info["steps"] == 4
        assert part.info["rows"] == 4
        (nested,) = client.search_runs(
            [logged.run.experiment_id], f"attributes.run_name = '{name}'"
        )
        assert nested.info.status == "FINISHED"
        curve = client.get_metric_history(nested.info.run_id, "loss")
        assert [point.value for point in curve] == [record["loss"] for record in history]


def test_checkpoints_come_as_often_as_the_run_wants(logged, base):
    train({"cluster-0": cluster_row_files(logged)["cluster-0"]}, base, logged)
    assert logged.executor.given["checkpoint_steps"] == 3
    (request,) = logged.executor.given["requests"]
    assert request.rows == logged.layout.row_tokens("cluster-0")
    assert request.checkpoint == logged.layout.checkpoint("cluster-0-" + "0" * 16)


def test_a_failing_job_fails_its_run_in_mlflow(logged, base):
    obstacle = logged.layout.adapter("cluster-2")
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the adapter's folder should be")
    with pytest.raises(NotADirectoryError):
        train({"cluster-2": cluster_row_files(logged)["cluster-2"]}, base, logged)
    (found,) = logged.run.client.search_runs(
        [logged.run.experiment_id], "attributes.run_name = 'cluster-2'"
    )
    assert found.info.status == "FAILED"
    assert "cluster-2" in found.data.tags["tclora.error"]


def test_what_a_training_uses_is_in_its_own_run(logged, base):
    class Busy(Inline):
        def run_isolated(self, function, /, **arguments):
            for share in (50.0, 75.0):
                used = {"cpu_utilization_percentage": share}
                self.on_sample("train_adapters", Sample(f"host-{share:.0f}", used))
            return function(**arguments)

    where = Where(logged.layout, logged.run, Busy(), JobProgress())
    train({"cluster-1": cluster_row_files(where)["cluster-1"]}, base, where)
    client = where.run.client
    (nested,) = client.search_runs(
        [where.run.experiment_id],
        "attributes.run_name = 'cluster-1' AND metrics.`system/cpu_utilization_percentage` > 0",
    )
    curve = client.get_metric_history(nested.info.run_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in curve] == [(0, 50.0), (1, 75.0)]
    assert nested.data.tags["tclora.host"] == "host-50, host-75"


def test_a_job_has_a_gpu_for_each_of_its_processes(logged, base):
    class Full(Inline):
        def run_isolated(self, function, /, **arguments):
            raise JobError(f"no {self.gpus} GPUs are free")

    where = Where(logged.layout, logged.run, Full(), JobProgress())
    with pytest.raises(JobError, match="no 2 GPUs are free"):
        train(cluster_row_files(logged), base, where, data_parallel=2)
