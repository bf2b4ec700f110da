"""What is measured, and how it is summarised."""

from pydantic import Field

from tclora.config.section import Positive, Section


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
