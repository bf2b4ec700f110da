"""Where jobs run, and how much of a machine they use."""

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tclora.config.section import Positive, Section
from tclora.errors import ConfigError
from tclora.store.url import check_url


class ResourceConfig(Section):
    """How much of the machine to use."""

    jobs: Positive | Literal["auto"] = Field(
        "auto", description="training and evaluation jobs at once; auto: one per GPU, else per core"
    )
    job_timeout: Positive = Field(86_400, description="a job is stopped after this time (s)")


class ExecutionConfig(Section):
    """Where training and evaluation jobs run."""

    backend: Literal["local", "deployment", "ray", "dask"] = Field(
        "local",
        description="local: processes on this machine; deployment: flow runs of their own on the "
        "work pool of a Prefect deployment, on any machine; ray, dask: tasks on a Ray or Dask "
        "cluster",
    )
    deployment: str = Field(
        "job/job",
        pattern=r"^[^/]+/[^/]+$",
        description="flow and name of the deployment that runs jobs",
    )
    ray_address: str | None = Field(
        None,
        description="HOST:PORT of a Ray cluster that this machine is a node of, or "
        "ray://HOST:PORT of any; without one, a cluster of the run's own on this machine",
    )
    dask_address: str | None = Field(
        None,
        description="HOST:PORT of a Dask scheduler, also with tcp:// or tls://; without one, a "
        "cluster of the run's own on this machine",
    )
    gpus_per_job: Literal["auto", 0, 1] = Field(
        "auto",
        description="GPUs that a Ray job asks for, or of a Dask worker's resource GPU, for each of "
        "its processes (train.data_parallel); auto: one if the cluster has any",
    )
    store: str | None = Field(
        None,
        description="fsspec URL through which jobs and this machine exchange files, such as "
        "file:///mnt/store or s3://bucket/prefix; without credentials, which come from the "
        "environment; with any backend, what a run has done is kept there until it has ended, so "
        "that one that was killed goes on on another machine made alike; Ray and Dask do "
        "without one where all workers see the output folder",
    )
    jobs_per_host: Positive = Field(
        1, description="jobs that a worker's machine runs at once: each gets its share of cores"
    )
    retries: int = Field(2, ge=0, description="new attempts at a job whose worker was lost")
    lost_after: Positive = Field(
        300, description="a started job that gives no sign for this time has lost its worker (s)"
    )

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str | None) -> str | None:
        try:
            return store and check_url(store)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("ray_address", "dask_address")
    @classmethod
    def _check_address(cls, address: str | None, info: ValidationInfo) -> str | None:
        field = str(info.field_name)
        schemes = {"ray_address": "(ray://)?", "dask_address": "((tcp|tls)://)?"}
        if address is None or re.fullmatch(rf"{schemes[field]}[^/\s]+:\d+", address):
            return address
        written = {"ray_address": "ray://HOST:PORT", "dask_address": "tcp://HOST:PORT"}
        raise ValueError(f"{field} must be HOST:PORT or {written[field]}, got {address!r}")

    @property
    def address(self) -> str | None:
        """Address of the cluster, where there is one to connect to."""
        return {"ray": self.ray_address, "dask": self.dask_address}.get(self.backend)

    @property
    def workers_here(self) -> bool:
        """Whether jobs run on this machine, on workers of the run's own."""
        return self.backend == "local" or (self.backend != "deployment" and not self.address)

    @model_validator(mode="after")
    def _check_together(self) -> "ExecutionConfig":
        if self.backend == "deployment" and not self.store:
            raise ValueError(
                "store must be set with backend 'deployment', such as file:///mnt/store or "
                "s3://bucket/prefix: jobs elsewhere see no folder of this machine"
            )
        return self
