"""The sections of a run's configuration; every field carries its unit and meaning."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tclora.errors import ConfigError
from tclora.store.url import check_url

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Frozen values without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def only(self, part: type[S]) -> S:
        """Return the values of one of the sections this one is made of."""
        return part(**{name: getattr(self, name) for name in part.model_fields})


class DataConfig(Section):
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
    max_read_rows: Positive | None = Field(
        None,
        description="keep a random sample of this many rows of every source while it is read; a "
        "hub dataset is then streamed, never stored or loaded whole",
    )
    max_train_rows: Positive | None = Field(None, description="use a random sample of this size")
    max_test_rows: Positive | None = Field(
        None, description="at most this many rows of each evaluation split"
    )
    seed: int | None = Field(
        None, ge=0, description="seed of the test split and of samples; else the run's seed"
    )
    demo_train_rows: Positive = Field(200, description="generated training rows per demo family")
    demo_test_rows: Positive = Field(40, description="generated test rows per demo family")


class EmbedConfig(Section):
    """How prompts become vectors."""

    model: str = Field(
        "all-minilm-l6-v2",
        description="'all-minilm-l6-v2' (built in), a local folder or a sentence-transformers id; "
        "of a causal LM, such as 'smollm2-135m-instruct' (built in), the mean hidden state",
    )
    batch_size: Positive = Field(64, description="prompts per forward pass")
    processes: Positive | Literal["auto"] = Field(
        "auto",
        description="that embed many prompts together; auto: one per GPU, one where there is none",
    )
    vectors: str | None = Field(
        None,
        description="Parquet file of embeddings made elsewhere by the same model, columns prompt "
        "and embedding; else the model embeds the prompts here",
    )


class FeatureConfig(Section):
    """What clusterers that look at the base model measure on rows."""

    probe_shards: Positive | Literal["task"] = Field(
        32,
        description="groups of similar prompts that get a probe adapter each (lora-parameters); "
        "task: one per task label",
    )
    probe_steps: Positive = Field(8, description="optimiser steps of a probe adapter")


class ClusterConfig(FeatureConfig):
    """How the training rows are divided among adapters."""

    method: str = Field(
        "kmeans", description="registered name of a clusterer; `tclora methods` lists them"
    )
    k: Positive | Literal["auto"] = Field(
        10, description="number of clusters; auto: best silhouette in k_range (k-means only)"
    )
    k_range: tuple[Positive, Positive] = Field((2, 12), description="candidates of k: auto")
    mix: Fraction = Field(
        0.0,
        description="weight of the text where rows are divided by what the model says of them "
        "(hidden-states, gradients, lora-parameters): 0 the model alone, 1 the text alone",
    )
    min_rows: Positive = Field(
        16, description="a smaller cluster is merged into its nearest (rows)"
    )
    hdbscan_min_cluster_size: Positive | Literal["auto"] = Field(
        "auto", description="HDBSCAN's smallest cluster (rows); auto: 2 % of them, 10 at least"
    )
    hdbscan_min_samples: Positive = Field(
        1, description="rows around a row that count for its density; more gives more noise"
    )
    hdbscan_selection: Literal["leaf", "eom"] = Field(
        "leaf",
        description="which clusters of HDBSCAN's tree: the leaves, or by excess of mass, which on "
        "mixed tasks tends to one large cluster and a few small ones",
    )
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
            if self.k_range[0] > self.k_range[1]:
                raise ValueError(f"k_range must be (low, high), got {list(self.k_range)}")
        elif self.fit_rows < self.k:
            raise ValueError(f"fit_rows must be at least k = {self.k}, got {self.fit_rows}")
        return self


class AdapterConfig(Section):
    """What determines one LoRA adapter beside its rows, its seeds and its base model."""

    r: Positive = Field(16, description="LoRA rank")
    alpha: Positive = Field(32, description="LoRA alpha; the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout (probability)")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="module name endings, or 'all-linear'"
    )
    rslora: bool = Field(
        False, description="scale the update by alpha / sqrt(r), rank-stabilised, not alpha / r"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of B over that of A (LoRA+); lr is that of A"
    )
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
    freeze_a: bool = Field(False, description="train B only (LoRA-FA): averaging becomes exact")
    gradient_checkpointing: bool = Field(False, description="trade compute for memory")
    quantisation: Literal["nf4"] | None = Field(
        None,
        description="nf4: train on a base whose linear layers have 4-bit weights (QLoRA; pip "
        "install tclora[qlora]); merges and evaluation keep the base as it is",
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of an adapter's rows held out to watch its loss on; the weights of the "
        "lowest are kept; 0: train on all rows and keep the last weights",
    )
    validation_steps: Positive | None = Field(
        None, description="steps between validations; a tenth of the training by default"
    )
    patience: Positive | None = Field(
        None, description="stop an adapter after this many validations without a new lowest loss"
    )

    @property
    def scaling(self) -> float:
        """Factor of B A x."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @model_validator(mode="after")
    def _check_patience(self) -> "AdapterConfig":
        if self.patience and not self.validation_fraction:
            raise ValueError(
                f"patience must come with a validation_fraction above 0, got {self.patience}; set "
                "validation_fraction=0.1, or leave patience out"
            )
        return self


class TrainConfig(AdapterConfig):
    """How the adapters are trained."""

    max_tokens: Positive = Field(1024, description="longest example; more is cut and reported")
    template: Literal["chat", "plain"] = Field(
        "chat", description="the tokenizer's chat template, or prompt, newline, response"
    )
    init: Literal["shared", "independent"] = Field(
        "shared", description="start every adapter from the same A_0, or from its own"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="type of weights in training and evaluation; auto: bf16 where fast"
    )
    checkpoint_steps: Positive = Field(20, description="steps between checkpoints")
    joint: bool = Field(
        True, description="also train one LoRA on all rows, the monolithic baseline"
    )
    engine: str = Field(
        "separate",
        description="how several adapters are trained; a registered engine, or auto: separate or "
        "together, whichever is faster of those whose jobs fit the memory (see run --plan)",
    )


class SolverConfig(Section):
    """How hard the CP solver tries."""

    n_starts: Positive = Field(4, description="starts per module; the best fit is kept")
    n_iter: Positive = Field(200, description="largest number of sweeps per start")
    solver: Literal["als", "tensorly"] = Field(
        "als",
        description="als: ours; tensorly: the reference, TensorLy's parafac on the same compressed "
        "cores, module by module, several times slower",
    )


class FactoriseConfig(SolverConfig):
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


class MergeConfig(Section):
    """Which merges to build and compare."""

    methods: tuple[str, ...] = Field(
        ("tc-lora", "uniform"), description="names from `tclora methods`"
    )
    primary: str = Field("tc-lora", description="the merge the run is for; registered in MLflow")

    sample_rows: int = Field(
        8,
        ge=0,
        description="training rows per cluster whose activations inform the merges that use them; "
        "0: data-free merges only",
    )
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="grid from which every method with a scale takes the one of lowest loss on the "
        "sample rows, such as [0.2, 0.4, 0.7, 1.0], going on beyond an end where the best lies "
        "there; empty: each at its default",
    )
    densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (),
        description="with scales: shares of elements kept to try for methods that have a density; "
        "empty: each at its default",
    )
    activations: Literal["base", "own"] = Field(
        "base",
        description="whose activations the statistics are: the base model's, or with each "
        "cluster's own adapter, as RegMean was published",
    )
    refit: Literal["primary", "all"] | tuple[str, ...] = Field(
        "primary",
        description="merges whose component weights are refitted in refit_steps: the primary one, "
        "all, or names of some; each stands in the tables without the refit too",
    )
    refit_steps: int = Field(
        10,
        ge=0,
        description="steps in which the weights of a merge's components are refitted by the base "
        "model's loss on the sample rows, its factors kept; 0: none",
    )

    @property
    def refitted(self) -> tuple[str, ...]:
        """The merges to refit."""
        if not (self.refit_steps and self.sample_rows):
            return ()
        named = {"primary": (self.primary,), "all": self.methods}
        return named[self.refit] if isinstance(self.refit, str) else self.refit

    @model_validator(mode="after")
    def _check_together(self) -> "MergeConfig":
        if self.primary not in self.methods:
            raise ValueError(
                f"primary must be one of methods {list(self.methods)}, got {self.primary!r}"
            )
        strange = set(() if isinstance(self.refit, str) else self.refit) - set(self.methods)
        if strange:
            raise ValueError(
                f"refit must be of methods {list(self.methods)}, 'primary' or 'all', got "
                f"{sorted(strange)}"
            )
        if self.densities and not self.scales:
            raise ValueError("densities are chosen together with scales, but scales is empty")
        if self.scales and not self.sample_rows:
            raise ValueError("scales are chosen on sample rows, but sample_rows is 0")
        return self


class RouterConfig(Section):
    """How prompts are routed."""

    router: str = Field(
        "nearest", description="registered name of a router; `tclora methods` lists them"
    )
    top_k: Positive | None = Field(None, description="mix at most this many clusters")
    coverage: Fraction = Field(
        0.99,
        description="at least this share of a cluster's training prompts counts as known, however "
        "abstain_at is chosen",
    )


class GateConfig(Section):
    """What prompts far from every cluster get; values left out are chosen by loss."""

    fallback_spread: Fraction | None = Field(
        None,
        description="how the fallback gate is made of all clusters: 0, each update counts on its "
        "own cluster's inputs; 1, on all inputs alike, an average",
    )
    fallback_scale: float | None = Field(
        None, gt=0, description="factor on the fallback gate; below 1 shrinks to the base model"
    )
    abstain_at: float | None = Field(
        None,
        description="nearness at which a prompt gets half the fallback gate: 0 is as far from its "
        "nearest cluster as other clusters' rows, 1 as near as its own; -9 abstains from none",
    )
    abstain_width: float | None = Field(
        None, ge=0, description="nearness over which the fallback takes over; 0 is a step"
    )


class RouteConfig(RouterConfig, GateConfig):
    """The routed library: the primary merge's factors, gated per prompt by the text router."""

    enabled: bool = Field(True, description="build the routed library and evaluate it")
    calibration_rows: int = Field(
        8,
        ge=0,
        description="training rows per cluster by whose loss the fallback gate and abstention are "
        "chosen, each as a row of its cluster in other words and as one of a cluster left out; 0: "
        "stated defaults",
    )
    static_share: Fraction = Field(
        0.0,
        description="share of the fallback gate in the static merge of the routed library, which "
        "stock PEFT loads: more of it is better out of domain and worse in domain",
    )


class MeasureConfig(Section):
    """What is measured on every held-out row."""

    token_budget: Positive = Field(2048, description="padded tokens per forward pass")
    generate: bool = Field(
        True, description="also score generated answers, each by its row's scorer"
    )
    max_new_tokens: Positive = Field(24, description="longest generated answer (tokens)")


class IntervalConfig(Section):
    """How intervals are computed."""

    confidence: float = Field(0.95, gt=0, lt=1, description="level of the bootstrap intervals")
    resamples: Positive = Field(2000, description="bootstrap resamples")


class LmEvalConfig(Section):
    """Which standard benchmarks of lm-eval are run."""

    lm_eval: tuple[str, ...] = Field((), description="lm-eval tasks to run as well")
    lm_eval_limit: Positive | None = Field(None, description="items per lm-eval task")
    allow_code_execution: bool = Field(
        False,
        description="run model-written code: of rows whose scorer runs it, in a sandbox, and of "
        "lm-eval tasks such as humaneval, without one",
    )


class EvaluateConfig(MeasureConfig, IntervalConfig, LmEvalConfig):
    """What is measured, and how it is summarised."""

    cross_rows: int = Field(
        0,
        ge=0,
        description="held-out rows of every cluster to measure under every cluster's adapter, "
        "alone and added to the cluster's own, for the K x K tables of what adapters do to each "
        "other's rows; 0: none",
    )


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
        description="GPUs that a Ray job asks for, or of a Dask worker's resource GPU; auto: one "
        "if the cluster has any",
    )
    store: str | None = Field(
        None,
        description="fsspec URL through which jobs and this machine exchange files, such as "
        "file:///mnt/store or s3://bucket/prefix; without credentials, which come from the "
        "environment; Ray and Dask do without one where all workers see the output folder",
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


class Config(Section):
    """A whole run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder and label"
    )
    output: Path = Field(Path("runs"), description="folder of libraries, MLflow store and caches")
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
