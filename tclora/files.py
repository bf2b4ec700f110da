"""Digests and atomic writes: a path either holds all of its bytes or does not exist."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of one file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_path(path: Path) -> str:
    """Return the SHA-256 of a file, or of a directory's relative names and file digests.

    Parameters
    ----------
    path : Path
        A file, or a directory (walked in sorted order; empty folders do not count).

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_paths(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file or directory; several are read at once.

    Raises
    ------
    FileNotFoundError
        If one is missing.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing needs no lock of the interpreter's
        return list(pool.map(sha256_path, paths))


def sha256_json(value: Any) -> str:  # noqa: ANN401
    """Return the SHA-256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary sibling of `target` to write a file or directory to, then rename it.

    On success the result replaces whatever `target` was; on an exception nothing of it changes and
    the temporary path is removed.

    Parameters
    ----------
    target : Path
        Where the finished file or directory shall be.

    Yields
    ------
    Path
        A path that does not exist yet, on the same file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = scratch / target.name
        yield fresh
        _sync(fresh)
        if target.is_dir():  # a folder cannot be renamed onto one that is not empty
            target.replace(scratch / "old")
        try:
            fresh.replace(target)
        except OSError:
            if (scratch / "old").exists():
                (scratch / "old").replace(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def link_path(source: Path, target: Path) -> None:
    """Let a file, or every file of a directory, appear elsewhere: hard links, or else copies.

    What was there is replaced. Whoever changes one of the two must write it anew and rename it, as
    `atomic_path` does.
    """
    with atomic_path(target) as fresh:
        if source.is_dir():
            shutil.copytree(source, fresh, copy_function=link_file)
        else:
            link_file(source, fresh)


def link_file(source: str | Path, target: str | Path) -> None:
    """Link a file; copy it to another file system, or to one without hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    """Flush a file, or every file of a directory, to disk, so that a rename never precedes it."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def parquet_batches(
    table: "ParquetFile", rows: int, columns: list[str] | None = None
) -> "Iterator[RecordBatch]":
    """Yield a Parquet file's rows, at most so many at a time, one row group in memory.

    Arrow keeps what it has freed for itself; at the end it is given back.
    """
    import pyarrow as pa

    for group in range(table.num_row_groups):
        yield from table.iter_batches(rows, row_groups=[group], columns=columns)
    pa.default_memory_pool().release_unused()


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which its writer leaves in an order of chance.

    Equal contents are equal bytes then.
    """
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(length))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write a JSON-serialisable value atomically, indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
