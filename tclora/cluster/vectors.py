"""Embeddings that may be larger than memory: files of vectors, and functions applied in blocks.

Symbols: N rows, D width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tclora.errors import DataError

Embeddings = NDArray[np.float32]
BLOCK = 65_536  # rows at once

_NAME = "embeddings"


@dataclass(frozen=True)
class VectorFile:
    """Some or all rows of a safetensors file with one float32 array of shape (N, D).

    It is read like an array, ``vectors[rows]`` or ``numpy.asarray(vectors)``; what is read is
    copied. The file is not mapped: scattered rows of a map make all of it resident.

    Attributes
    ----------
    path : Path
        The file.
    shape : tuple of int
        (rows, D) of the rows that count.
    offset : int
        Where the array begins in the file (bytes).
    height : int
        Rows in the file.
    rows : ndarray of int64, optional
        The rows of the file that count, in this order; all if None.
    """

    path: Path
    shape: tuple[int, int]
    offset: int
    height: int
    rows: NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: Path) -> "VectorFile":
        """Open a file that `create`, or safetensors itself, wrote.

        Raises
        ------
        DataError
            If it holds something else.
        """
        try:
            with safe_open(path, framework="np") as file:
                (name,) = file.keys()
                stored = file.get_slice(name)
                (rows, width), dtype = stored.get_shape(), stored.get_dtype()
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"{path} must be a safetensors file of one matrix of embeddings: {error}"
            ) from error
        if dtype != "F32":
            raise DataError(f"{path} must hold float32, got {dtype}; write it again")
        return cls(path, (rows, width), path.stat().st_size - 4 * rows * width, rows)

    @classmethod
    def create(cls, path: Path, rows: int, width: int) -> "VectorFile":
        """Make a file of zeros, to be filled by ``vectors[rows] = values``."""
        size = 4 * rows * width
        entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}
        header = json.dumps({_NAME: entry}).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(file.tell() + size)
        return cls(path, (rows, width), 8 + len(header), rows)

    def take(self, rows: NDArray[np.int64]) -> "VectorFile":
        """Return the vectors of some rows, still in the file."""
        chosen = rows if self.rows is None else self.rows[rows]
        return replace(self, rows=chosen, shape=(len(chosen), self.shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Embeddings:  # noqa: ANN401
        places = self._places(key)
        found = np.empty((len(places), self.shape[1]), dtype=np.float32)
        with self.path.open("rb") as file:
            for start, stop in _runs(places):
                file.seek(self._position(places[start]))
                file.readinto(found[start:stop].data.cast("B"))
        return found

    def __setitem__(self, key: Any, values: Embeddings) -> None:  # noqa: ANN401
        places = self._places(key)
        rows = np.ascontiguousarray(np.broadcast_to(values, (len(places), self.shape[1])), "<f4")
        with self.path.open("r+b") as file:
            for start, stop in _runs(places):
                file.seek(self._position(places[start]))
                file.write(rows[start:stop].data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: ANN401
        return self[:].astype(dtype or np.float32, copy=False)

    def _places(self, key: Any) -> NDArray[np.int64]:  # noqa: ANN401
        """Return the rows of the file that a key stands for."""
        rows = np.arange(self.height, dtype=np.int64) if self.rows is None else self.rows
        return np.asarray(rows[key], dtype=np.int64)

    def _position(self, place: np.int64) -> int:
        return self.offset + 4 * self.shape[1] * int(place)


def _runs(places: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the parts of a list of rows that follow each other in the file."""
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    bounds = [0, *ends.tolist(), len(places)] if len(places) else []
    yield from pairwise(bounds)


Vectors = Embeddings | VectorFile


def row_blocks(rows: int) -> Iterator[slice]:
    """Yield slices that cover so many rows, `BLOCK` at a time."""
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def by_blocks(
    function: Callable[[Embeddings], NDArray[Any]], vectors: Vectors, dtype: type = np.float32
) -> NDArray[Any]:
    """Apply a function of the vectors that gives one value or vector per row, block by block.

    Parameters
    ----------
    function : callable
        (n, D) vectors → n results.
    vectors : array or VectorFile, shape (N, D)
        The rows.
    dtype : type
        Of the result; that of an empty one only.

    Returns
    -------
    ndarray
        The results of all rows, joined.
    """
    parts = [function(vectors[block]) for block in row_blocks(len(vectors))]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def sample(vectors: Vectors, limit: int, seed: int) -> Embeddings:
    """Return at most `limit` random rows in their order."""
    if len(vectors) <= limit:
        return np.asarray(vectors)
    rows = np.random.default_rng(seed).choice(len(vectors), size=limit, replace=False)
    return vectors[np.sort(rows)]
