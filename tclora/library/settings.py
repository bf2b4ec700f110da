"""What readers of a library need of its run's configuration, whatever version wrote it."""

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DataSettings(_Settings):
    """Where the rows came from; see `tclora.config.DataConfig`."""

    path: str
    test_path: str | None = None
    ood_path: str | None = None
    composition_path: str | None = None


class TrainSettings(_Settings):
    """How prompts were encoded and adapters shaped; see `tclora.config.TrainConfig`."""

    r: int
    template: str
    max_tokens: int
    dtype: str = "auto"


class MergeSettings(_Settings):
    """Which merge the run was for; see `tclora.config.MergeConfig`."""

    primary: str
    sample_rows: int = Field(validation_alias=AliasChoices("sample_rows", "calibration_rows"))


class EvaluateSettings(_Settings):
    """How intervals were made; see `tclora.config.EvaluateConfig`."""

    confidence: float


class Settings(_Settings):
    """The settings that readers of a library use, whatever else the run's version knew."""

    seed: int
    data: DataSettings
    train: TrainSettings
    merge: MergeSettings
    evaluate: EvaluateSettings
