"""How adapters are factorised, merged and routed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tclora.config.section import Fraction, Positive, Section


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
        5,
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
        "nearest",
        description="registered name of a router: nearest, softmax, membership, per-token, or a "
        "plugin's",
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
