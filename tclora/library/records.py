"""What a library's manifest says, as typed records.

Counts are rows, tokens or bytes as named; shares are fractions, 0 to 1; losses are nats per
response token.
"""

from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator

from tclora.library.identity import LocatedModel, ModelIdentity, Record
from tclora.library.settings import Settings

SCHEMA: Literal[2] = 2


class Clustering(Record):
    """How the training rows were clustered.

    Attributes
    ----------
    method : str
        The clusterer.
    k : int
        Number of clusters K.
    silhouette, ari, nmi : float or None
        Quality, and agreement with the rows' tasks; None where it is not defined.
    notices : tuple of str
        What the clusterer has to say.
    sizes : tuple of int
        Training rows per cluster.
    dropped : int
        Training rows in no cluster.
    """

    method: str
    k: int
    silhouette: float | None = None
    ari: float | None = None
    nmi: float | None = None
    notices: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dropped: int = 0


class Training(Record):
    """How one adapter was trained.

    Attributes
    ----------
    rows, steps, supervised_tokens : int
        Training rows, optimiser steps, tokens that entered the loss.
    final_loss : float or None
        Running loss at the end.
    seconds : float
        Duration (s).
    validation_nll : float or None
        Lowest loss on rows held out from training, nats per response token; the adapter had it.
    planned_seconds : float or None
        What the cost model says of the job's loop on the machine of the run (s); None elsewhere.
    status : str
        "done", or what kept it from being so.
    error : str or None
        Message of the failure.
    """

    rows: int
    steps: int
    supervised_tokens: int
    final_loss: float | None
    seconds: float
    validation_nll: float | None = None
    planned_seconds: float | None = None
    status: str = "done"
    error: str | None = None


class Factors(Record):
    """The joint factorisation.

    Attributes
    ----------
    rank : int
        CP rank R.
    explained_variance : float
        Share of the adapters' squared norm that the factors reproduce.
    """

    rank: int
    explained_variance: float


class Merge(Record):
    """One merged adapter.

    Attributes
    ----------
    rank : int
        Its LoRA rank.
    parameters, bytes : int
        Its size.
    truncation_loss : float
        Share of the squared norm lost by truncation to the rank.
    notes : str
        What else was done.
    losses : tuple of float
        Loss on the sample rows before and after each step of refitting.
    """

    rank: int
    parameters: int
    bytes: int
    truncation_loss: float
    notes: str = ""
    losses: tuple[float, ...] = ()


class CalibrationBin(Record):
    """Prompts whose routing confidence lies in one tenth.

    Attributes
    ----------
    low : float
        Lower end of the tenth.
    n : int
        Prompts in it.
    confidence, accuracy : float
        Mean confidence, and share that was routed rightly.
    """

    low: float
    n: int
    confidence: float
    accuracy: float


class Routed(Record):
    """The routed library.

    Attributes
    ----------
    method : str
        The merge it gates.
    router : str
        Registered name of the router; "mode" in libraries of the previous version.
    by_token : bool
        Whether every token chooses its clusters itself.
    bytes_share : float
        Its bytes over those of the separate adapters.
    temperature : float or None
        Of the probabilities of a text router; None for a router without one.
    accuracy, calibration_error : float or None
        On held-out in-domain prompts, where there are any with a known cluster.
    coverage_test, coverage_ood, coverage_composition : float or None
        Share of a split's prompts that are near enough to a cluster to be routed.
    fallback_spread, fallback_scale, abstain_at, abstain_width, static_share : float or None
        What prompts far from every cluster get; see `tclora.config.GateConfig`. None in libraries
        of the previous version, where they got the static merge.
    probes_loss, probes_never, probes_always : float or None
        Loss of the probes that abstention was chosen on: so, if the router never abstained, and if
        it always did; None where it was not chosen by loss.
    calibration_curve : tuple of CalibrationBin
        Confidence against accuracy.
    """

    method: str
    router: str = Field(validation_alias=AliasChoices("router", "mode"))
    by_token: bool = False
    bytes_share: float
    temperature: float | None = None
    accuracy: float | None = None
    calibration_error: float | None = None
    coverage_test: float | None = None
    coverage_ood: float | None = None
    coverage_composition: float | None = None
    fallback_spread: float | None = None
    fallback_scale: float | None = None
    abstain_at: float | None = None
    abstain_width: float | None = None
    static_share: float | None = None
    probes_loss: float | None = None
    probes_never: float | None = None
    probes_always: float | None = None
    calibration_curve: tuple[CalibrationBin, ...] = ()

    @property
    def coverage(self) -> dict[str, float]:
        """Split → its coverage, where it was measured."""
        splits = {
            "test": self.coverage_test,
            "ood": self.coverage_ood,
            "composition": self.coverage_composition,
        }
        return {split: share for split, share in splits.items() if share is not None}


class Storage(Record):
    """Bytes on disk of the forms of the library; those of a merge are in its own record.

    Attributes
    ----------
    separate_adapters, factors, routed : int or None
        One adapter per cluster, the joint factors, the routed library.
    """

    separate_adapters: int | None = None
    factors: int | None = None
    routed: int | None = None


class Description(Record):
    """What a run says about its library.

    Attributes
    ----------
    name : str
        Of the run.
    config : dict
        The whole configuration as it was, JSON; what readers need of it is in `settings`.
    base_model, embedding_model
        What it was made with.
    profile : dict of str to float
        Numbers of the data; see `tclora.data.examples.profile`.
    clustering, factors, storage
        See there.
    training : dict of str to Training
        By adapter name.
    merges : dict of str to Merge
        By method.
    routed : Routed or None
        None where no routed library was made.
    links : dict of str to str or None
        Where the run was tracked.
    """

    name: str
    config: dict[str, Any]
    base_model: LocatedModel
    embedding_model: ModelIdentity
    profile: dict[str, float]
    clustering: Clustering
    training: dict[str, Training]
    factors: Factors
    merges: dict[str, Merge]
    routed: Routed | None = None
    storage: Storage
    links: dict[str, str | None] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _check_settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        Settings.model_validate(config)
        return config

    @property
    def settings(self) -> Settings:
        """The settings that readers use."""
        return Settings.model_validate(self.config)


class Manifest(Description):
    """What ``library.json`` says.

    Attributes
    ----------
    schema_version : int
        Of the file; a previous one is brought to this one when it is read.
    created : str
        Time of writing (ISO 8601, UTC).
    versions : dict of str to str
        Package → version.
    digests : dict of str to str
        Name below the library → SHA-256 of the file. Libraries of schema 1 list folders too; see
        `tclora.files.sha256_path`.
    """

    schema_version: Literal[2] = Field(SCHEMA, alias="schema")
    created: str
    versions: dict[str, str]
    digests: dict[str, str]
