"""A whole run: its sections, and what they must be together."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tclora.config.evaluation import EvaluateConfig
from tclora.config.execution import ExecutionConfig, ResourceConfig
from tclora.config.merging import FactoriseConfig, MergeConfig, RouteConfig
from tclora.config.preparation import ClusterConfig, DataConfig, EmbedConfig
from tclora.config.section import Positive, Section
from tclora.config.training import TrainConfig
from tclora.errors import ConfigError
from tclora.store.url import check_url

_FOLDER = Path("runs")


class Config(Section):
    """A whole run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder and label"
    )
    output: Path = Field(
        _FOLDER,
        description="folder of libraries, MLflow store and caches; or the fsspec URL of a store, "
        "such as s3://bucket/prefix: the run then works in the folder 'runs', and the URL is "
        "publish_to, and execution.store unless that is another one",
    )
    publish_to: str | None = Field(
        None,
        description="fsspec URL of a store, such as s3://bucket/prefix, into which the finished "
        "library is put as well; any machine then opens it as URL/NAME; without credentials, which "
        "come from the environment",
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    training_seed: int | None = Field(
        None, ge=0, description="seed of training and of what follows, in place of seed"
    )
    seeds: Positive = Field(
        1,
        description="training seeds, counted from training_seed: with several, NAME-seedN is the "
        "library of every further one, on the same rows and clusters, and the evaluation of NAME "
        "is over all of them",
    )
    base_model: str = Field(
        "smollm2-135m-instruct",
        description="'smollm2-135m-instruct' (built in), a local folder or a Hugging Face id",
    )
    data: DataConfig = DataConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    factorise: FactoriseConfig = FactoriseConfig()
    merge: MergeConfig = MergeConfig()
    route: RouteConfig = RouteConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    resources: ResourceConfig = ResourceConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="before")
    @classmethod
    def _open_output(cls, values: Any) -> Any:  # noqa: ANN401
        """Take an output that is a store's URL apart: where a run works, and where things go."""
        try:
            url = (
                _url(values["output"]) if isinstance(values, dict) and "output" in values else None
            )
        except ConfigError:  # `_check_output` refuses it
            url = None
        if url is None:
            return values
        execution = values.get("execution", {})
        if isinstance(execution, ExecutionConfig):
            execution = execution.model_dump(exclude_unset=True)
        store = execution.get("store") if isinstance(execution, dict) else None
        # Both are of a former output where a resolved configuration is given another one.
        if (former := values.get("publish_to")) not in (None, url, store):
            return values
        opened = {**values, "output": str(_FOLDER), "publish_to": url}
        if isinstance(execution, dict) and store in (None, former):
            opened["execution"] = {**execution, "store": url}
        return opened

    @field_validator("output", mode="before")
    @classmethod
    def _check_output(cls, output: object) -> object:
        try:
            url = _url(output)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if url is not None:  # else it was taken apart
            raise ValueError(
                f"output and publish_to must be one URL, got {url!r} and another; name a folder "
                "as output, or set publish_to=null"
            )
        return output

    @field_validator("publish_to")
    @classmethod
    def _check_publish_to(cls, url: str | None) -> str | None:
        try:
            return url and check_url(url, "publish_to")
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_machines(self) -> "Config":
        wanted = {"dtype": "bfloat16 or float32", "engine": "a registered engine"}
        for name, values in wanted.items():
            if not self.execution.workers_here and getattr(self.train, name) == "auto":
                raise ValueError(
                    f"train.{name} must be {values} with execution.backend "
                    f"{self.execution.backend!r}, got 'auto': the workers' machines are not known"
                )
        return self

    @property
    def of_training(self) -> int:
        """Seed of training and of what follows it."""
        return self.seed if self.training_seed is None else self.training_seed

    def replicas(self) -> "list[Config]":
        """Return the configurations of the further training seeds, each on its own."""
        return [
            self.model_copy(
                update={"name": f"{self.name}-seed{seed}", "training_seed": seed, "seeds": 1}
            )
            for seed in range(self.of_training + 1, self.of_training + self.seeds)
        ]

    @property
    def library_dir(self) -> Path:
        """Absolute folder of the run's library."""
        return (self.output / self.name).absolute()


def _url(output: object) -> str | None:
    """Return an output that is a store's URL; None for a folder."""
    return check_url(str(output), "output") if "://" in str(output) else None
