"""The configuration of a run: one YAML file, validated whole before anything expensive starts.

Every field carries its unit and meaning (``tclora config --schema`` prints them). Unknown keys are
refused with the nearest known one, and all problems are reported together.
"""

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tclora.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """Which examples to learn from and to test on."""

    path: str = Field(
        "demo",
        description="'demo' (generated), a JSONL/Parquet/CSV file, a folder of them, or a Hugging "
        "Face dataset id",
    )
    hub_config: str | None = Field(None, description="configuration name of a hub dataset")
    hub_split: str = Field("train", description="split of a hub dataset to train on")
    test_path: str | None = Field(None, description="rows to test on; else test_fraction of path")
    test_fraction: Fraction = Field(0.1, description="share of rows held out where none are marked")
    ood_path: str | None = Field(None, description="out-of-domain rows, never trained on")
    ood_tasks: tuple[str, ...] = Field((), description="task labels held out wholly, out-of-domain")
    composition_path: str | None = Field(None, description="rows that need several trained skills")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="canonical column (prompt, response, task, ...) -> column in the file",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="stop at malformed or empty rows, or leave them out and report them"
    )
    max_train_rows: Positive | None = Field(None, description="use a random sample of this size")
    max_test_rows: Positive | None = Field(
        None, description="at most this many rows of each evaluation split"
    )
    demo_train_rows: Positive = Field(200, description="generated training rows per demo family")
    demo_test_rows: Positive = Field(40, description="generated test rows per demo family")


class EmbedConfig(_Section):
    """How prompts become vectors."""

    model: str = Field(
        "all-minilm-l6-v2",
        description="'all-minilm-l6-v2' (built in), a local folder or a sentence-transformers id",
    )
    batch_size: Positive = Field(64, description="prompts per forward pass")


class ClusterConfig(_Section):
    """How the training rows are divided among adapters."""

    method: Literal["kmeans", "hdbscan", "random", "task"] = Field(
        "kmeans", description="random and task (by label) are controls"
    )
    k: Positive | Literal["auto"] = Field(
        10, description="number of clusters; auto: best silhouette in k_range (k-means only)"
    )
    k_range: tuple[Positive, Positive] = Field((2, 12), description="candidates of k: auto")
    min_rows: Positive = Field(
        16, description="a smaller cluster is merged into its nearest (rows)"
    )
    hdbscan_min_cluster_size: Positive = Field(20, description="HDBSCAN's smallest cluster (rows)")
    hdbscan_dimensions: Positive = Field(
        15, description="PCA dimensions HDBSCAN works in, where the embedding has more"
    )
    noise: Literal["nearest", "drop"] = Field(
        "nearest", description="HDBSCAN noise: to the nearest centroid, or not trained on"
    )
    fit_rows: Positive = Field(50_000, description="fit on a sample of at most this many rows")

    @model_validator(mode="after")
    def _check_k(self) -> "ClusterConfig":
        if self.k == "auto":
            if self.method == "random":
                raise ValueError("k must be a number with method: random, got 'auto'")
            if self.k_range[0] > self.k_range[1]:
                raise ValueError(f"k_range must be (low, high), got {list(self.k_range)}")
        elif self.fit_rows < self.k:
            raise ValueError(f"fit_rows must be at least k = {self.k}, got {self.fit_rows}")
        return self


class TrainConfig(_Section):
    """How one LoRA adapter is trained."""

    r: Positive = Field(16, description="LoRA rank")
    alpha: Positive = Field(32, description="LoRA alpha; the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout (probability)")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="module name endings, or 'all-linear'"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="learning-rate schedule after warm-up"
    )
    warmup_fraction: Fraction = Field(0.05, description="share of the steps spent warming up")
    batch_size: Positive = Field(16, description="rows per optimiser step")
    tokens_per_forward: Positive = Field(
        1024, description="padded tokens per forward pass; a step is split accordingly"
    )
    epochs: float = Field(1.0, gt=0, description="passes over a cluster's rows")
    max_steps: Positive | None = Field(None, description="stop earlier, after this many steps")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    max_tokens: Positive = Field(1024, description="longest example; more is cut and reported")
    template: Literal["chat", "plain"] = Field(
        "chat", description="the tokenizer's chat template, or prompt, newline, response"
    )
    init: Literal["shared", "independent"] = Field(
        "shared", description="start every adapter from the same A_0, or from its own"
    )
    freeze_a: bool = Field(False, description="train B only (LoRA-FA): averaging becomes exact")
    gradient_checkpointing: bool = Field(False, description="trade compute for memory")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="type of weights in training and evaluation; auto: bf16 where fast"
    )
    checkpoint_steps: Positive = Field(20, description="steps between checkpoints")
    joint: bool = Field(
        True, description="also train one LoRA on all rows, the monolithic baseline"
    )


class FactoriseConfig(_Section):
    """The joint CP decomposition of all adapters."""

    rank: Positive = Field(16, description="CP rank R, components per module")
    target_recovery: Fraction | None = Field(
        None,
        description="in place of rank: the smallest R, from r/2 upwards and exact to r/8, at which "
        "the routed library keeps this share of the own adapters' gain on recovery_rows training "
        "rows per cluster",
    )
    recovery_rows: Positive = Field(16, description="rows per cluster for target_recovery")
    ranks: tuple[Positive, ...] = Field(
        (1, 2, 4, 8, 16, 32, 64), description="ranks of the explained-variance curve"
    )
    n_starts: Positive = Field(4, description="starts per module; the best fit is kept")
    n_iter: Positive = Field(200, description="largest number of sweeps per start")


class MergeConfig(_Section):
    """Which merges to build and compare."""

    methods: tuple[str, ...] = Field(
        ("tc-lora", "uniform"), description="names from `tclora methods`"
    )
    primary: str = Field("tc-lora", description="the merge the run is for; registered in MLflow")

    calibration_rows: int = Field(
        8,
        ge=0,
        description="training rows per cluster whose activations inform the merges that use them; "
        "0: data-free merges only",
    )

    @model_validator(mode="after")
    def _check_primary(self) -> "MergeConfig":
        if self.primary not in self.methods:
            raise ValueError(
                f"primary must be one of methods {list(self.methods)}, got {self.primary!r}"
            )
        return self


class RouteConfig(_Section):
    """The routed library: the primary merge's factors, gated per prompt by the text router."""

    enabled: bool = Field(True, description="build the routed library and evaluate it")
    mode: Literal["nearest", "softmax", "membership"] = Field(
        "nearest",
        description="the nearest cluster alone; a softmax over similarities to all centroids at a "
        "calibrated temperature; or HDBSCAN's soft membership by distance to exemplars",
    )
    top_k: Positive | None = Field(None, description="mix at most this many clusters")
    coverage: Fraction = Field(
        0.99,
        description="at least this share of a cluster's prompts counts as known; the threshold "
        "lies halfway to other clusters' rows, and prompts beyond it get the static merge",
    )


class EvaluateConfig(_Section):
    """What is measured."""

    token_budget: Positive = Field(2048, description="padded tokens per forward pass")
    generate: bool = Field(True, description="also score generated answers (exact match)")
    max_new_tokens: Positive = Field(24, description="longest generated answer (tokens)")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the bootstrap intervals")
    resamples: Positive = Field(2000, description="bootstrap resamples")
    harness: tuple[str, ...] = Field((), description="lm-eval tasks to run as well")
    harness_limit: Positive | None = Field(None, description="items per lm-eval task")
    allow_code_execution: bool = Field(
        False, description="run model-written code of lm-eval tasks such as humaneval"
    )


class ResourceConfig(_Section):
    """How much of the machine to use."""

    jobs: Positive | Literal["auto"] = Field(
        "auto", description="training and evaluation jobs at once; auto: one per GPU, else per core"
    )
    job_timeout: Positive = Field(86_400, description="a job is stopped after this time (s)")


class Config(_Section):
    """A whole run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder and label"
    )
    output: Path = Field(Path("runs"), description="folder of libraries, MLflow store and caches")
    seed: int = Field(0, ge=0, description="seed of everything random")
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

    @property
    def library_dir(self) -> Path:
        """Absolute folder of the run's library."""
        return (self.output / self.name).absolute()


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and validate everything.

    Parameters
    ----------
    source : str, Path or mapping, optional
        YAML file or nested mapping; the defaults alone if None.
    overrides : sequence of str
        ``"train.epochs=1"``; values are YAML.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        With every problem found: unreadable file, unknown keys, wrong types or values.
    """
    if isinstance(source, Mapping):
        values = deepcopy(dict(source))
    else:
        values = {} if source is None else _read_yaml(Path(source))
    for override in overrides:
        _apply_override(values, override)
    named = isinstance(source, (str, Path))
    return parse_config(values, source=str(source) if named else "configuration")


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a nested mapping; see `load_config`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{source} has {len(problems)} problem(s):\n{listing}") from None


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List the dotted keys of every section and field, in file order."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            keys += config_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override must be key=value, got {override!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        nested = values.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        values = nested
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _describe(problem: Any) -> str:  # noqa: ANN401
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, config_keys(), n=1) or [
            known for known in config_keys() if known.endswith(f".{key}")
        ]
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message}"
        if problem["type"] == "value_error"
        else (f"{key}: {message}, got {problem['input']!r}")
    )


def _is_union_tag(part: Any) -> bool:  # noqa: ANN401
    """Whether pydantic put the name of a union's member in an error's location."""
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "constrained-int"})
