"""Where prompts belong in a library."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from tclora.cluster.centroids import assign
from tclora.cluster.embed import embed_texts
from tclora.cluster.vectors import Embeddings
from tclora.errors import ModelError
from tclora.library.layout import Layout
from tclora.library.names import cluster_name
from tclora.library.records import Manifest
from tclora.model.locate import locate_embedder, model_digest
from tclora.route import read_library
from tclora.route.quality import true_clusters
from tclora.route.routing import Routing


class Places:
    """Where prompts belong in a library: their splits, nearest and true clusters, routes.

    Parameters
    ----------
    layout : Layout
        Of the library.
    manifest : Manifest
        What it says of itself.
    cache : Path
        Folder of embeddings.
    """

    def __init__(self, layout: Layout, manifest: Manifest, cache: Path) -> None:
        self._layout = layout
        self._embedder = manifest.embedding_model
        self._cache = cache

    @cached_property
    def true(self) -> pd.Series:
        """Task the adapters were trained on → the cluster of most of its rows."""
        rows = pd.read_parquet(self._layout.clusters, columns=["task", "split", "cluster"])
        known = rows.assign(true=true_clusters(rows)).dropna(subset=["true"])
        return known.groupby("task")["true"].first().astype(int)

    def label(self, rows: pd.DataFrame, *, clusters: bool) -> pd.DataFrame:
        """Return rows with their splits and, where asked for, nearest clusters.

        Rows of a task that was trained on are in-domain ("test") and others out of domain ("ood"),
        except those of split "composition"; without task labels in the library, rows keep theirs.
        """
        kept = rows["split"] == "composition"
        trained = rows["task"].isin(self.true.index).map({True: "test", False: "ood"})
        named = rows["split"].fillna("test") if self.true.empty else trained
        split = rows["split"].where(kept, named)
        return rows.assign(split=split, cluster=self.nearest(rows) if clusters else None)

    def nearest(self, rows: pd.DataFrame) -> pd.Series:
        """Return the clusters whose centroids are nearest to the prompts."""
        centres = load_file(self._layout.centroids)["centroids"]
        return pd.Series(assign(self._embed(rows), centres)[0], index=rows.index)

    def routed(self, rows: pd.DataFrame) -> Routing:
        """Route prompts as the library does."""
        return read_library(self._layout.routed.folder).router.route(self._embed(rows))

    def oracle(self, rows: pd.DataFrame) -> Routing:
        """Route each row to its task's cluster; of a task that was not trained on, to the nearest.

        No prompt gets the static merge.
        """
        own = rows["task"].map(self.true) if "task" in rows else pd.Series(np.nan, rows.index)
        numbers = own.fillna(self.nearest(rows)).astype(int).tolist()
        names = read_library(self._layout.routed.folder).gated.names
        weights = np.zeros((len(rows), len(names)), np.float32)
        places = [names.index(cluster_name(number)) for number in numbers]
        weights[np.arange(len(rows)), places] = 1
        return Routing(weights, np.ones(len(rows), bool), np.ones(len(rows), np.float32))

    def _embed(self, rows: pd.DataFrame) -> Embeddings:
        location = locate_embedder(self._embedder.id)
        if model_digest(location) != self._embedder.digest:
            raise ModelError(
                f"the embedding model must be the library's own, {self._embedder.id!r} (digest "
                f"{self._embedder.digest[:12]}), but another one is there under its name"
            )
        return embed_texts(
            rows["prompt"].tolist(),
            location,
            cache=self._cache,
            model_digest=self._embedder.digest,
        )
