"""Readers: JSONL, Parquet, CSV, folders of them and Hugging Face datasets to blocks of raw rows."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tclora.config import DataConfig
from tclora.errors import DataError
from tclora.files import parquet_batches, sha256_json, sha256_path

_KINDS = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false",
}  # fmt: skip
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
BROKEN = "tclora:broken"  # column: what is wrong with a line that holds no row
BLOCK_ROWS = 25_000  # rows that are Python objects at once: some 60 MB of a few hundred bytes each


def read_table(path: str, hub_config: str | None = None, hub_split: str = "train") -> pd.DataFrame:
    """Read a source whole; see `read_blocks`. A line that holds no row is an error."""
    blocks = list(read_blocks(path, hub_config, hub_split))
    for block in blocks:
        for number, problem in broken_lines(block).items():
            raise DataError(f"{path}, line {number}: {problem}; repair it")
    return pd.concat(blocks) if blocks else pd.DataFrame()


def broken_lines(block: pd.DataFrame) -> dict[Any, str]:
    """Return what is wrong with the lines of a block that hold no row, by their numbers."""
    return block[BROKEN].dropna().to_dict() if BROKEN in block else {}


def read_blocks(
    path: str, hub_config: str | None = None, hub_split: str = "train", *, stream: bool = False
) -> Iterator[pd.DataFrame]:
    """Read a file, a folder of files or a Hugging Face dataset, some rows at a time.

    Parameters
    ----------
    path : str
        A file ending in .jsonl, .json (one object per line, or one array), .parquet or .csv; a
        folder of such files; or a dataset id.
    hub_config, hub_split : str
        Configuration and split of a hub dataset.
    stream : bool
        Read a hub dataset as it arrives, without storing it.

    Yields
    ------
    DataFrame
        At most `BLOCK_ROWS` rows (but all of a JSON array), indexed by row number, counted from 1
        (in JSONL files the line); "FILE:NUMBER" for a folder. A line that is no JSON object has
        nothing but what is wrong with it, in the column `BROKEN`.

    Raises
    ------
    DataError
        If nothing is there, the form is unknown, or a file is malformed (with its line).
    """
    location = Path(path)
    if location.is_dir():
        files = sorted(f for f in location.iterdir() if f.suffix in SUFFIXES)
        if not files:
            raise DataError(f"data folder {path!r} holds no file ending in {', '.join(SUFFIXES)}")
        for file in files:
            for block in _read_file(file):
                yield block.set_axis([f"{file.name}:{number}" for number in block.index], axis=0)
    elif location.is_file():
        yield from _read_file(location)
    elif is_local(path):
        raise DataError(f"data file {path!r} does not exist")
    else:
        yield from read_hub(path, hub_config, hub_split, stream=stream)


def is_local(path: str) -> bool:
    """Whether a data path names a file or folder, rather than the demo or a dataset of the hub."""
    location = Path(path)
    named = location.suffix in SUFFIXES or location.is_absolute() or path.startswith(".")
    return named or location.exists()


def source_digest(config: DataConfig) -> str:
    """Digest of the files a configuration reads; of the names alone for hub datasets."""
    named = [config.path, config.test_path, config.ood_path, config.composition_path]
    return sha256_json(
        [sha256_path(Path(name)) if name and Path(name).exists() else name for name in named]
    )


def _read_file(file: Path) -> Iterator[pd.DataFrame]:
    readers = {
        ".jsonl": _read_json,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if file.suffix not in readers:
        raise DataError(f"data file {str(file)!r} must end in one of {', '.join(SUFFIXES)}")
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        line = _undecodable_line(file)
        raise DataError(f"{file}, line {line}: must be UTF-8 text; re-encode the file") from error


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise ValueError(f"file must hold a line that is not UTF-8, got {file}")


def _read_json(file: Path) -> Iterator[pd.DataFrame]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        rows = _array_rows(file) if _is_array(file) else _line_rows(lines)
        while part := list(islice(rows, BLOCK_ROWS)):
            numbers = pd.Index([number for number, _ in part], name="row")
            yield pd.DataFrame([row for _, row in part], index=numbers, dtype=object)


def _is_array(file: Path) -> bool:
    with file.open(encoding="utf-8-sig") as text:
        return next((line for line in text if line.strip()), "").lstrip().startswith("[")


def _array_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: is not a valid JSON array: {error}; repair it") from error
    for number, row in enumerate(rows, start=1):
        yield number, _object(row)


def _line_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, _object(json.loads(line))
            except ValueError as error:
                yield number, {BROKEN: f"is not valid JSON: {error}"}


def _object(row: object) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    kind = _KINDS.get(type(row), "null")
    return {BROKEN: f"must be an object, got {kind}"}


def _read_parquet(file: Path) -> Iterator[pd.DataFrame]:
    start = 1
    try:
        for batch in parquet_batches(pq.ParquetFile(file), BLOCK_ROWS):
            yield _numbered(pa.Table.from_batches([batch]).to_pandas(), start)
            start += len(batch)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: is not a readable Parquet file: {error}") from error


def _read_csv(file: Path) -> Iterator[pd.DataFrame]:
    start = 1
    try:
        # Only an empty field is missing: "NA", "None" and "null" are answers.
        with pd.read_csv(
            file, dtype=object, keep_default_na=False, na_values=[""], encoding="utf-8-sig",
            chunksize=BLOCK_ROWS,
        ) as blocks:  # fmt: skip
            for block in blocks:
                if not isinstance(block.index, pd.RangeIndex):  # took the surplus for an index
                    raise DataError(
                        f"{file}: is not valid CSV: row 1 has more fields than the header"
                    )
                yield _numbered(block, start)
                start += len(block)
    except pd.errors.EmptyDataError:
        raise DataError(
            f"{file}: must hold at least one row, got an empty file; give rows"
        ) from None
    except pd.errors.ParserError as error:
        raise DataError(f"{file}: is not valid CSV: {error}; repair it") from error


def read_hub(
    name: str, config: str | None, split: str, *, stream: bool = False
) -> Iterator[pd.DataFrame]:
    """Read a dataset that `datasets` knows, some rows at a time; see `read_blocks`."""
    import datasets

    start = 1
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=stream)
        for columns in dataset.iter(BLOCK_ROWS):
            block = pd.DataFrame(columns, dtype=object)
            yield _numbered(block, start)
            start += len(block)
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path {name!r} is neither a file or folder nor a dataset that can be reached "
            f"(config {config!r}, split {split!r}): {reason}"
        ) from error


def _numbered(block: pd.DataFrame, start: int) -> pd.DataFrame:
    return block.set_axis(pd.RangeIndex(start, start + len(block)), axis=0)
