"""Limits that clusterers share: rows to fit on, clusters to make."""

import numpy as np

from tclora.cluster.embed import Embeddings
from tclora.errors import DataError


def sample(vectors: Embeddings, limit: int, seed: int) -> Embeddings:
    """Return at most `limit` random rows in their order."""
    if len(vectors) <= limit:
        return vectors
    rows = np.random.default_rng(seed).choice(len(vectors), size=limit, replace=False)
    return vectors[np.sort(rows)]


def check_k(n_rows: int, k: int | str) -> int:
    """Return the number of clusters.

    Raises
    ------
    DataError
        If there are fewer rows.
    """
    if int(k) > n_rows:
        raise DataError(
            f"cluster.k must be at most the number of training rows ({n_rows}), got {k}; "
            "lower cluster.k or read more rows"
        )
    return int(k)
