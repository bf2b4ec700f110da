"""Embeddings made elsewhere, read from a Parquet file and put in the order of the prompts."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tclora.cluster.embed import Texts, distinct_texts, spread
from tclora.cluster.vectors import Embeddings, VectorFile
from tclora.errors import DataError
from tclora.files import parquet_batches

_READ = 10_000  # rows at once


def place_vectors(texts: Texts, file: Path, target: Path) -> VectorFile:
    """Write the embeddings that a file holds of texts, scaled to unit norm, in their order.

    Parameters
    ----------
    texts : sequence or Series of str
        Prompts.
    file : Path
        Parquet with columns prompt and embedding (lists of D numbers), in any order.
    target : Path
        File to write, shape (N, D).

    Raises
    ------
    DataError
        If the file is not there or cannot be read, lacks a prompt, or holds a vector that is not
        finite, not of the first one's width, or zero.
    """
    place, distinct = distinct_texts(texts)
    with TemporaryDirectory(dir=target.parent) as scratch:
        return spread(_collect(distinct, file, Path(scratch) / "distinct"), place, target)


def given_width(file: Path) -> int:
    """Return the width of the first embedding that a file holds.

    Raises
    ------
    DataError
        If the file is not there or cannot be read, or holds none.
    """
    for _, vectors in _given(file, 1):
        return int(vectors.shape[1])
    raise DataError(f"embed.vectors: {file} must hold at least one row, got none; add the prompts")


def _collect(distinct: pd.Index, file: Path, target: Path) -> VectorFile:
    """Write the vectors of distinct texts, in their order."""
    seen = np.zeros(len(distinct), dtype=bool)
    found: VectorFile | None = None
    for prompts, vectors in _given(file, _READ):
        found = found or VectorFile.create(target, len(distinct), vectors.shape[1])
        rows = distinct.get_indexer(pd.Index(prompts))
        known = rows >= 0
        found[rows[known]] = vectors[known]
        seen[rows[known]] = True
    if found is None or not seen.all():
        missing = np.flatnonzero(~seen)
        raise DataError(
            f"embed.vectors: {file} must hold every prompt, lacks {len(missing)}, such as "
            f"{distinct[missing[0]]!r:.80}; add them, or leave embed.vectors out"
        )
    return found


def _given(file: Path, rows: int) -> Iterator[tuple[list[str], Embeddings]]:
    """Yield prompts and their unit vectors from a file of embeddings, so many rows at a time."""
    if not file.is_file():
        raise DataError(
            f"embed.vectors must name a file that exists, got {str(file)!r}; correct the path"
        )
    try:
        table = pq.ParquetFile(file)
        _check_columns(table.schema_arrow, file)
        start = width = 0
        for batch in parquet_batches(table, rows, ["prompt", "embedding"]):
            prompts = [str(text).strip() for text in batch.column("prompt").to_pylist()]
            lists = batch.column("embedding")
            widths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
            width = width or int(widths[0])
            _check_widths(widths, width, file, start)
            yield prompts, _unit(lists, file, start)
            start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"embed.vectors: {file} must be a readable Parquet file: {error}"
        ) from error


def _check_columns(schema: pa.Schema, file: Path) -> None:
    if missing := {"prompt", "embedding"} - set(schema.names):
        raise DataError(
            f"embed.vectors: {file} must have columns prompt and embedding, lacks "
            f"{', '.join(sorted(missing))}; rename its columns"
        )
    kind = schema.field("embedding").type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    lists |= pa.types.is_fixed_size_list(kind)
    numbers = lists and (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    )
    if not numbers:
        raise DataError(
            f"embed.vectors: {file}: column embedding must hold lists of numbers, got {kind}; "
            "write it again"
        )


def _check_widths(widths: NDArray[np.int64], width: int, file: Path, start: int) -> None:
    if not width:
        raise DataError(f"embed.vectors: {file}, row 1: must hold numbers, got none; repair it")
    if len(other := np.flatnonzero(widths != width)):
        row = int(other[0])
        raise DataError(
            f"embed.vectors: {file}, row {start + row + 1}: must be of the first row's width, "
            f"{width}, got {widths[row]}; make them by one model"
        )


def _unit(column: pa.Array, file: Path, start: int) -> Embeddings:
    """Return the vectors of some rows, all of one width, scaled to unit norm."""
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = flat.reshape(len(column), -1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
        row = start + int(bad[0]) + 1
        raise DataError(f"embed.vectors: {file}, row {row}: must be finite and not zero; repair it")
    return np.asarray(vectors / norms, dtype=np.float32)
