"""Embeddings made elsewhere, read from a Parquet file and put in the order of the prompts."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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
        If the file cannot be read, lacks a prompt, or holds a vector that is not finite, not of
        the others' width, or zero.
    """
    place, distinct = distinct_texts(texts)
    with TemporaryDirectory(dir=target.parent) as scratch:
        return spread(_collect(distinct, file, Path(scratch) / "distinct"), place, target)


def _collect(distinct: pd.Index, file: Path, target: Path) -> VectorFile:
    """Write the vectors of distinct texts, in their order."""
    seen = np.zeros(len(distinct), dtype=bool)
    found: VectorFile | None = None
    for prompts, vectors in _given(file):
        found = found or VectorFile.create(target, len(distinct), vectors.shape[1])
        if vectors.shape[1] != found.shape[1]:
            raise DataError(
                f"embed.vectors: {file} must hold vectors of one width, got {vectors.shape[1]} "
                f"beside {found.shape[1]}; make them by one model"
            )
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


def _given(file: Path) -> Iterator[tuple[list[str], Embeddings]]:
    """Yield prompts and their unit vectors from a file of embeddings, some rows at a time."""
    try:
        table = pq.ParquetFile(file)
        if missing := {"prompt", "embedding"} - set(table.schema_arrow.names):
            raise DataError(
                f"embed.vectors: {file} must have columns prompt and embedding, lacks "
                f"{', '.join(sorted(missing))}; rename its columns"
            )
        start = 0
        for batch in parquet_batches(table, _READ, ["prompt", "embedding"]):
            prompts = [str(text).strip() for text in batch.column("prompt").to_pylist()]
            yield prompts, _unit(batch.column("embedding"), file, start)
            start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"embed.vectors: {file} must be a readable Parquet file: {error}"
        ) from error


def _unit(column: pa.Array, file: Path, start: int) -> Embeddings:
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = len(column[0]) if len(column) else 0
    if not width or len(flat) != width * len(column):
        raise DataError(
            f"embed.vectors: {file} must hold vectors of one width, got others from row "
            f"{start + 1} on; make them by one model"
        )
    vectors = flat.reshape(len(column), width)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
        row = start + int(bad[0]) + 1
        raise DataError(f"embed.vectors: {file}, row {row}: must be finite and not zero; repair it")
    return np.asarray(vectors / norms, dtype=np.float32)
