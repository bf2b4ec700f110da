"""A uniform sample of rows that come in blocks, kept in bounded memory."""

import numpy as np
import pyarrow as pa


class Reservoir:
    """Keeps the rows with the lowest of random keys, or all of them.

    Every row draws a key; which rows have the `size` lowest ones does not depend on how the rows
    are cut into blocks.

    Parameters
    ----------
    size : int or None
        Rows to keep; all if None.
    seed : int
        Seed of the keys.
    """

    def __init__(self, size: int | None, seed: int = 0) -> None:
        self.seen = 0  # rows that came
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._keys = np.zeros(0)
        self._parts: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """Take the next rows."""
        self.seen += len(rows)
        self._parts.append(rows)
        if self._size is None:
            return
        self._keys = np.concatenate([self._keys, self._rng.random(len(rows))])
        if len(self._keys) > 2 * self._size:
            self._prune(self._size)

    def table(self) -> pa.Table:
        """Return the rows kept, in the order in which they came."""
        if self._size is not None and len(self._keys) > self._size:
            self._prune(self._size)
        return pa.concat_tables(self._parts)

    def _prune(self, size: int) -> None:
        kept = np.sort(np.argpartition(self._keys, size)[:size])
        self._keys = self._keys[kept]
        self._parts = [pa.concat_tables(self._parts).take(kept)]
