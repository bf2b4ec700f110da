"""The table of clusters: every example with its cluster, its similarity and its place on a map."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.cluster.centroids import Labels
from tclora.cluster.quality import map_2d
from tclora.cluster.rows import Clustering, cluster_rows
from tclora.cluster.vectors import VectorFile, Vectors, row_blocks
from tclora.config import ClusterConfig


def cluster_examples(
    frame: pd.DataFrame,
    vectors: VectorFile,
    config: ClusterConfig,
    *,
    features: Vectors | None = None,
    seed: int = 0,
) -> tuple[Clustering, pd.DataFrame]:
    """Cluster the training rows and assign every other row to the cluster that answers for it.

    Parameters
    ----------
    frame : DataFrame
        All examples: columns id, prompt, task, split.
    vectors : VectorFile, shape (N, D)
        Their unit-norm embeddings.
    config, features, seed
        See `cluster_rows`; features are of the training rows.

    Returns
    -------
    clustering : Clustering
        Of the training rows.
    table : DataFrame
        Columns id, prompt, task, split, cluster, similarity (cosine to the cluster's centroid), and
        x and y, the place on a map of two dimensions.
    """
    training = (frame["split"] == "train").to_numpy()
    inside, outside = np.flatnonzero(training), np.flatnonzero(~training)
    tasks = frame["task"].to_numpy(object)
    known, unseen = tasks[training].tolist(), tasks[~training].tolist()
    result = cluster_rows(vectors.take(inside), config, tasks=known, features=features, seed=seed)
    labels = np.empty(len(frame), dtype=np.int64)
    labels[training] = result.labels
    labels[~training] = result.assign(vectors.take(outside), unseen)
    points = map_2d(vectors, seed)
    table = frame[["id", "prompt", "task", "split"]].assign(
        cluster=labels,
        similarity=_similarity(vectors, labels, result.centroids),
        x=points[:, 0],
        y=points[:, 1],
    )
    return result, table


def _similarity(
    vectors: Vectors, labels: Labels, centres: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return each row's cosine similarity to its cluster's centroid; to the first for noise."""
    found = np.empty(len(labels), dtype=np.float32)
    for rows in row_blocks(len(labels)):
        own = centres[np.maximum(labels[rows], 0)]
        found[rows] = (vectors[rows] * own).sum(axis=1)
    return found
