"""Which executor a run has, by its configuration."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.dask_tasks import dask_tasks
from tasks.deployed import FlowRuns
from tasks.fleet import Fleet
from tasks.ray_tasks import ray_tasks
from tasks.remote import RemoteExecutor
from tclora.config import Config
from tclora.jobs.devices import parallel_jobs
from tclora.jobs.run import Executor, LocalExecutor
from tclora.library.layout import Layout
from tclora.library.places import job_store
from tclora.store.objects import Store

SLOTS = 32  # jobs that are sent at once; how many of them run, the workers' limits say
_PAUSE = {True: 0.5, False: 2.0}  # s between two looks at a job, by whether its worker is here


@contextmanager
def executing(config: Config, layout: Layout, around: Executor | None = None) -> Iterator[Executor]:
    """Give a run its executor, checked before anything is done.

    Records of jobs elsewhere are kept while the run may be interrupted, and forgotten when it ends
    well.

    Parameters
    ----------
    config : Config
        Of the run.
    layout : Layout
        Where it works; its checkpoints stay where a job runs.
    around : Executor, optional
        Of the run that this one is part of; they share their workers.

    Raises
    ------
    ConfigError
        If there is no such deployment or cluster.
    StoreError
        If the store cannot be written.
    """
    resources, execution = config.resources, config.execution
    if execution.backend == "local":
        yield LocalExecutor.of(resources.jobs, resources.job_timeout)
        return
    here = execution.workers_here
    slots = parallel_jobs(resources.jobs) if here or resources.jobs != "auto" else SLOTS
    folder = job_store(config.library_dir)
    store = Store(execution.store or f"file://{folder}")
    store.check()
    with _fleet(config, slots, around) as fleet:
        executor = RemoteExecutor(
            fleet=fleet,
            store=store,
            config=execution,
            scratch=layout.checkpoints,
            slots=slots,
            timeout=resources.job_timeout,
            pause=_PAUSE[here],
            beside=slots if here else None,
        )
        yield executor
    executor.forget()
    if not execution.store:
        shutil.rmtree(folder)


@contextmanager
def _fleet(config: Config, workers: int, around: Executor | None) -> Iterator[Fleet]:
    execution, most = config.execution, config.train.data_parallel
    if isinstance(around, RemoteExecutor):
        yield around.fleet
    elif execution.backend == "ray":
        with ray_tasks(execution.ray_address, execution.gpus_per_job, workers, most) as ray:
            yield ray
    elif execution.backend == "dask":
        with dask_tasks(execution.dask_address, execution.gpus_per_job, workers, most) as dask:
            yield dask
    else:
        flow_runs = FlowRuns(execution.deployment, execution.lost_after)
        flow_runs.check()
        yield flow_runs
