"""How adapters are trained."""

import math
from typing import Literal

from pydantic import Field, model_validator

from tclora.config.section import Fraction, Positive, Section

_TOKENS, _GPU_TOKENS = 2048, 32768  # per forward pass


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
    tokens_per_forward: Positive | None = Field(
        None,
        description="tokens per forward pass, to which a step is split, padding counted; by "
        "default 2048, in training on a GPU 32768; halved where a GPU's memory lacks",
    )
    data_parallel: Positive = Field(
        1,
        description="processes of a training job that share the rows of every step, each with a "
        "GPU (or its share of the cores) and a copy of the base model; gradients are added up",
    )
    adapters_at_once: Positive | None = Field(
        None,
        description="adapters of a training job that the device holds at once, the longest first; "
        "as one finishes, the next takes its place; all by default",
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

    def tokens_at_once(self, *, gpu: bool = False) -> int:
        """Return the tokens per forward pass, in training on a GPU or anywhere else."""
        return self.tokens_per_forward or (_GPU_TOKENS if gpu else _TOKENS)

    def held_at_once(self, adapters: int) -> int:
        """Return how many of a job's adapters the device holds at once."""
        return min(adapters, self.adapters_at_once or adapters)

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
