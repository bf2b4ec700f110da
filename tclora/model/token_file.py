"""Rows in tokens as an Arrow file, which jobs map into memory instead of tokenising again.

Columns: ``tokens`` (prompt and response behind each other, large_list of int32), ``prompt`` (int32,
how many of them are the prompt's), ``truncated`` (bool). Equal rows are equal bytes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tclora.model.tokens import TokenRow

SUFFIX = ".arrow"
_SCHEMA = pa.schema(
    [("tokens", pa.large_list(pa.int32())), ("prompt", pa.int32()), ("truncated", pa.bool_())]
)


class TokenCounts(NamedTuple):
    """Rows of a file, their tokens, those of responses among them, and how many rows were cut."""

    rows: int
    tokens: int
    supervised: int
    truncated: int


class TokenFile(Sequence[TokenRow]):
    """The rows of a file of one batch, as `write_chosen` makes it; only those asked for are read.

    Parameters
    ----------
    file : Path
        Mapped into memory, and shared there with other processes that map it.
    """

    def __init__(self, file: Path) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
        lists = batch.column("tokens")
        self._tokens: NDArray[np.int32] = lists.values.to_numpy()
        self._offsets: NDArray[np.int64] = lists.offsets.to_numpy()
        self._prompts: NDArray[np.int32] = batch.column("prompt").to_numpy()
        self._truncated = batch.column("truncated")

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...

    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        start, end = self._offsets[place : place + 2].tolist()
        middle = start + int(self._prompts[place])
        return TokenRow(
            tuple(self._tokens[start:middle].tolist()),
            tuple(self._tokens[middle:end].tolist()),
            truncated=self._truncated[place].as_py(),
        )


def write_tokens(blocks: Iterable[Sequence[TokenRow]], target: Path) -> TokenCounts:
    """Write rows to a file, block by block; return what was counted on the way.

    Parameters
    ----------
    blocks : iterable of sequences of TokenRow
        One of them is in memory at a time.
    target : Path
        The file; `write_chosen` takes rows of it.
    """
    counts = TokenCounts(0, 0, 0, 0)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for rows in blocks:
            writer.write_batch(_batch(rows))
            own = (
                len(rows),
                sum(len(row) for row in rows),
                sum(len(row.response) for row in rows),
                sum(row.truncated for row in rows),
            )
            counts = TokenCounts(*(old + new for old, new in zip(counts, own, strict=True)))
    return counts


def write_chosen(source: Path, places: NDArray[np.int64], target: Path) -> None:
    """Write some rows of a file to another, in the order given.

    Parameters
    ----------
    source : Path
        What `write_tokens` has written.
    places : ndarray of int64, shape (rows,)
        Their numbers in the source; at least one.
    target : Path
        Their bytes do not depend on the other rows of the source.
    """
    with pa.memory_map(str(source)) as mapped:
        chosen = pa.ipc.open_file(mapped).read_all().take(pa.array(places)).combine_chunks()
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for batch in chosen.to_batches():
                writer.write_batch(batch)


def _batch(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    columns = [
        [row.prompt + row.response for row in rows],
        [len(row.prompt) for row in rows],
        [row.truncated for row in rows],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA)
