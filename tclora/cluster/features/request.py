"""What a job that computes features of rows is asked for, and the job."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tclora.cluster.registry import clusterers
from tclora.cluster.vectors import VectorFile
from tclora.config import AdapterConfig, FeatureConfig
from tclora.errors import ModelError
from tclora.files import atomic_path
from tclora.jobs.call import EventCallback
from tclora.model.base import Base

Features = NDArray[np.float32]


class FeatureRequest(BaseModel):
    """Training rows, and the model to look at them with.

    Attributes
    ----------
    base : Base
        The base model.
    examples : Path
        Parquet file of all examples; those of split "train" count.
    embeddings : Path
        Embeddings of all prompts.
    config : FeatureConfig
        Settings of the features.
    adapter : AdapterConfig
        Of the adapters that are to be trained on the clusters.
    seed : int
        Seed of anything random, the start of adapters included; those of the run start from its
        training seed, where that is another.
    scratch : Path
        Folder for what is under way; one of other rows or settings must not be there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Base
    examples: Path
    embeddings: Path
    config: FeatureConfig
    adapter: AdapterConfig
    seed: int
    scratch: Path

    def frame(self) -> pd.DataFrame:
        """Return the training rows."""
        frame = pd.read_parquet(self.examples, columns=["prompt", "response", "task", "split"])
        return frame[frame["split"] == "train"].reset_index(drop=True)

    def vectors(self) -> VectorFile:
        """Return the embeddings of the training rows' prompts."""
        splits = pd.read_parquet(self.examples, columns=["split"])["split"]
        return VectorFile.open(self.embeddings).take(np.flatnonzero(splits == "train"))


def compute_features(
    *, name: str, request: FeatureRequest, target: Path, on_event: EventCallback = lambda _: None
) -> int:
    """Compute the features that a clusterer divides rows by; a job.

    Parameters
    ----------
    name : str
        Registered name of the clusterer.
    request : FeatureRequest
        Rows, model and settings.
    target : Path
        File of features to write, one row per training row in their order.
    on_event : callable
        Called with how many units, ``done``, of how many, ``of``, are finished.

    Returns
    -------
    int
        Width of the features.

    Raises
    ------
    ModelError
        If a feature is not finite.
    """
    function = clusterers[name].features
    if function is None:
        raise ValueError(f"name must be a clusterer that looks at the model, got {name!r}")
    features = function(request, on_event)
    if not np.isfinite(features).all():
        raise ModelError(
            f"cluster.method {name!r} got features that are not finite; set train.dtype=float32"
        )
    with atomic_path(target) as fresh:
        VectorFile.create(fresh, *features.shape)[:] = features
    return int(features.shape[1])


def unit_rows(features: Features) -> Features:
    """Scale rows to unit norm; rows of zeros stay."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(norms > 0, norms, 1), dtype=np.float32)
