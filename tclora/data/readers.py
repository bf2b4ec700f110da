"""Readers: JSONL, Parquet, CSV, folders of them and Hugging Face datasets to raw tables."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from tclora.config import DataConfig
from tclora.errors import DataError
from tclora.files import sha256_json, sha256_path

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_table(path: str, hub_config: str | None = None, hub_split: str = "train") -> pd.DataFrame:
    """Read a file, a folder of files or a Hugging Face dataset.

    Parameters
    ----------
    path : str
        A file ending in .jsonl, .json (one object per line, or one array), .parquet or .csv; a
        folder of such files; or a dataset id.
    hub_config, hub_split : str
        Configuration and split of a hub dataset.

    Returns
    -------
    DataFrame
        Indexed by row number, counted from 1 (in JSONL files the line); "FILE:NUMBER" for a folder.

    Raises
    ------
    DataError
        If nothing is there, the form is unknown, or a row is malformed (with its file and line).
    """
    location = Path(path)
    if location.is_dir():
        files = sorted(f for f in location.iterdir() if f.suffix in SUFFIXES)
        if not files:
            raise DataError(f"data folder {path!r} holds no file ending in {', '.join(SUFFIXES)}")
        tables = [_read_file(file) for file in files]
        return pd.concat(
            table.set_axis([f"{file.name}:{number}" for number in table.index], axis=0)
            for file, table in zip(files, tables, strict=True)
        )
    if location.is_file():
        return _read_file(location)
    if is_local(path):
        raise DataError(f"data file {path!r} does not exist")
    return _read_hub(path, hub_config, hub_split)


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


def _read_file(file: Path) -> pd.DataFrame:
    readers = {
        ".jsonl": _read_json_lines,
        ".json": _read_json_lines,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if file.suffix not in readers:
        raise DataError(f"data file {str(file)!r} must end in one of {', '.join(SUFFIXES)}")
    try:
        return readers[file.suffix](file)
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: must be UTF-8 text; re-encode the file") from error


def _read_json_lines(file: Path) -> pd.DataFrame:
    text = file.read_bytes().decode("utf-8-sig")
    numbers, rows = [], []
    for number, row in _json_rows(file, text):
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, row {number}: must be an object, got {type(row).__name__}; repair it"
            )
        numbers.append(number)
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(numbers, name="row"), dtype=object)


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, object]]:
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except ValueError as error:
            raise DataError(f"{file}: is not a valid JSON array: {error}; repair it") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{file}, line {number}: is not valid JSON: {error}; repair it"
                ) from error


def _read_parquet(file: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: is not a readable Parquet file: {error}") from error
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1), axis=0)


def _read_csv(file: Path) -> pd.DataFrame:
    text = file.read_bytes().decode("utf-8-sig")
    try:
        # Only an empty field is missing: "NA", "None" and "null" are answers.
        frame = pd.read_csv(io.StringIO(text), dtype=object, keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        raise DataError(
            f"{file}: must hold at least one row, got an empty file; give rows"
        ) from None
    except pd.errors.ParserError as error:
        raise DataError(f"{file}: is not valid CSV: {error}; repair it") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the surplus for an index
        raise DataError(f"{file}: is not valid CSV: row 1 has more fields than the header")
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1), axis=0)


def _read_hub(name: str, config: str | None, split: str) -> pd.DataFrame:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path {name!r} is neither a file or folder nor a dataset that can be reached "
            f"(config {config!r}, split {split!r}): {reason}"
        ) from error
    frame: pd.DataFrame = dataset.to_pandas()
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1), axis=0)
