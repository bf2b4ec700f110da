"""The limit that clusterers share: no more clusters than rows."""

from tclora.errors import DataError


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
