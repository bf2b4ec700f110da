"""What a run and its jobs use, as MLflow's UI finds it under System metrics."""

import socket

from tasks.system_metrics import watching
from tclora.jobs.run import LocalExecutor
from tests.jobs import functions


def test_a_run_has_what_its_process_and_its_jobs_use(run):
    with watching(run, LocalExecutor()) as executor:
        executor.shared_by(2).run_isolated(functions.variable, name="HOME")
    found = run.client.get_run(run.run_id).data
    metrics, host = found.metrics, socket.gethostname()
    assert [found.tags[f"tclora.host{job}"] for job in ("", ".variable-HOME")] == [host] * 2
    for place in ("system", "system/variable-HOME"):
        assert metrics[f"{place}/process_memory_usage_megabytes"] > 1
        assert metrics[f"{place}/system_memory_usage_percentage"] > 0
        assert f"{place}/cpu_utilization_percentage" in metrics
