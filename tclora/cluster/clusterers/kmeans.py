"""k-means on unit vectors: Euclidean, hence cosine."""

from typing import TYPE_CHECKING

from tclora.cluster.clusterers.limits import check_k
from tclora.cluster.quality import silhouette
from tclora.cluster.registry import Groups, Rows, register
from tclora.cluster.vectors import Embeddings, by_blocks, sample
from tclora.config import ClusterConfig
from tclora.errors import DataError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans


@register("kmeans")
def kmeans(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """k-means on the prompts' embeddings; with k: auto the K of best silhouette.

    Raises
    ------
    DataError
        If there are fewer rows than clusters.
    """
    fitted = sample(rows.vectors, config.fit_rows, seed)
    if config.k != "auto":
        k = check_k(len(rows), config.k)
        return Groups(by_blocks(_fit(fitted, k, seed).predict, rows.vectors))
    low, high = max(2, config.k_range[0]), min(config.k_range[1], len(fitted) - 1)
    if low > high:
        raise DataError(
            f"cluster.k_range must leave at least one K between 2 and N-1 = {len(fitted) - 1}, "
            f"got {list(config.k_range)}"
        )
    fits = {k: _fit(fitted, k, seed) for k in range(low, high + 1)}
    scores = {k: silhouette(fitted, fit.labels_, seed) or -1.0 for k, fit in fits.items()}
    best = max(scores, key=lambda k: scores[k])
    notice = f"K = {best} has the best silhouette ({scores[best]:.3f}) of {low} … {high}"
    return Groups(by_blocks(fits[best].predict, rows.vectors), (notice,))


def _fit(vectors: Embeddings, k: int, seed: int) -> "KMeans":
    from sklearn.cluster import KMeans  # costs as much as all the rest of a short command

    return KMeans(k, n_init=10, random_state=seed).fit(vectors)
