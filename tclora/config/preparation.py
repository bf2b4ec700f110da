"""What is read, embedded and clustered."""

from typing import Literal

from pydantic import Field, model_validator

from tclora.config.section import Fraction, Positive, Section


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
        "kmeans",
        description="registered name of a clusterer: kmeans, hdbscan, hidden-states, gradients, "
        "lora-parameters, task, random, or a plugin's",
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
