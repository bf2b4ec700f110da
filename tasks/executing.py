"""Which executor a run has, by its configuration."""

from collections.abc import Iterator
from contextlib import contextmanager

from tasks.deployed import SLOTS, DeploymentExecutor
from tclora.config import Config
from tclora.jobs.run import Executor, LocalExecutor
from tclora.library.layout import Layout


@contextmanager
def executing(config: Config, layout: Layout) -> Iterator[Executor]:
    """Give a run its executor, checked before anything is done.

    Records of jobs elsewhere are kept while the run may be interrupted, and forgotten when it ends
    well.

    Parameters
    ----------
    config : Config
        Of the run.
    layout : Layout
        Where it works; its checkpoints stay where a job runs.

    Raises
    ------
    ConfigError, StoreError
        See `DeploymentExecutor.check`.
    """
    resources, execution = config.resources, config.execution
    if execution.backend == "local":
        yield LocalExecutor.of(resources.jobs, resources.job_timeout)
        return
    slots = SLOTS if resources.jobs == "auto" else resources.jobs
    executor = DeploymentExecutor(execution, layout.checkpoints, slots, resources.job_timeout)
    executor.check()
    yield executor
    executor.forget()
