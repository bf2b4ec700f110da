"""A few rows of every cluster, for the jobs that look at the base model's behaviour on them."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from tclora.model.base import LoadedBase, read_rows
from tclora.model.tokens import TokenRow

Use = Literal["statistics", "scale", "refit", "rank", "route"]
_USES: tuple[Use, ...] = ("statistics", "scale", "refit", "rank", "route")


class Sample(BaseModel):
    """Which rows of which clusters, and what for.

    Rows are drawn at random by the seed, others for every use as long as a cluster has enough: what
    one step is fitted on does not flatter the next.

    Attributes
    ----------
    rows : dict of str to Path
        Adapter name of a cluster → Parquet file of its rows (columns prompt, response).
    count : int
        Rows per cluster; all where it has fewer.
    use : {"statistics", "scale", "refit", "rank", "route"}
        What the rows are for.
    seed : int
        Seed of the draw.
    token_budget : int
        Positions per forward pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: dict[str, Path]
    count: int
    use: Use
    seed: int
    token_budget: int

    def frame(self, cluster: str) -> pd.DataFrame:
        """Return the rows of one cluster."""
        frame = read_rows(self.rows[cluster])
        order = np.random.default_rng(self.seed).permutation(len(frame))
        start = _USES.index(self.use) * self.count
        chosen = np.take(order, range(start, start + min(self.count, len(frame))), mode="wrap")
        return frame.iloc[np.sort(chosen)]

    def token_rows(self, loaded: LoadedBase) -> dict[str, list[TokenRow]]:
        """Return the rows of every cluster in tokens."""
        return {cluster: loaded.encode(self.frame(cluster)) for cluster in self.rows}
