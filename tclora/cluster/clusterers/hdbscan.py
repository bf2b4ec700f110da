"""HDBSCAN on reduced dimensions: densities mean little in hundreds.

The defaults were chosen on 16 public tasks, see ``docs/studies/hdbscan.md``.
"""

import numpy as np

from tclora.cluster.centroids import NOISE, Labels, assign, centroids
from tclora.cluster.registry import Groups, Rows, register
from tclora.cluster.vectors import Embeddings, sample
from tclora.config import ClusterConfig
from tclora.errors import DataError

_FEWEST, _SHARE = 10, 0.02  # rows of the smallest cluster, and share of all


@register("hdbscan", counts=False)
def hdbscan(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """HDBSCAN on the prompts' embeddings in reduced dimensions; finds K itself.

    Raises
    ------
    DataError
        If every row is noise, or there are fewer than two clusters.
    """
    fitted = sample(rows.vectors, config.fit_rows, seed)
    labels = _fit(fitted, config, seed)
    centres = centroids(fitted, labels)
    if len(fitted) < len(rows):
        notice = f"HDBSCAN fitted on {len(fitted)} rows; all assigned to the nearest centroid"
        return Groups(assign(rows.vectors, centres)[0], (notice,))
    notices: tuple[str, ...] = ()
    if noise := int((labels == NOISE).sum()):
        action = "dropped" if config.noise == "drop" else "assigned to the nearest centroid"
        notices = (f"{noise} of {len(labels)} rows were HDBSCAN noise and {action}",)
    if config.noise == "drop":
        return Groups(labels, notices)
    return Groups(np.where(labels == NOISE, assign(rows.vectors, centres)[0], labels), notices)


def _fit(vectors: Embeddings, config: ClusterConfig, seed: int) -> Labels:
    """Return the labels of two clusters at least, and noise."""
    from hdbscan import HDBSCAN
    from sklearn.decomposition import PCA

    size = _smallest(len(vectors), config)
    if len(vectors) < size:
        raise DataError(
            f"cluster.hdbscan_min_cluster_size must be at most the number of training rows "
            f"({len(vectors)}), got {size}"
        )
    dimensions = min(config.hdbscan_dimensions, *vectors.shape)
    reduced = PCA(dimensions, random_state=seed).fit_transform(vectors)
    labels: Labels = HDBSCAN(
        min_cluster_size=size,
        min_samples=config.hdbscan_min_samples,
        cluster_selection_method=config.hdbscan_selection,
    ).fit_predict(reduced)
    found = int(labels.max()) + 1
    if found < 2:
        state = "called every row noise" if not found else "found a single cluster"
        raise DataError(
            f"HDBSCAN {state} among {len(vectors)} rows with min_cluster_size {size}; "
            "lower cluster.hdbscan_min_cluster_size or use cluster.method: kmeans"
        )
    return labels


def _smallest(rows: int, config: ClusterConfig) -> int:
    """Return the size of the smallest cluster."""
    size = config.hdbscan_min_cluster_size
    return max(_FEWEST, round(_SHARE * rows)) if size == "auto" else int(size)
