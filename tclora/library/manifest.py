"""The library directory's manifest: what is in it, from what it was made, with digests."""

import json
import platform
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tclora.errors import LibraryError
from tclora.files import sha256_path, write_json

MANIFEST = "library.json"
SCHEMA = 1
_PACKAGES = (
    "tclora", "torch", "transformers", "peft", "sentence-transformers", "scikit-learn",
    "hdbscan", "tensorly", "prefect", "mlflow",
)  # fmt: skip


def write_manifest(root: Path, values: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write ``library.json`` once everything it names is on disk.

    Parameters
    ----------
    root : Path
        The library directory.
    values : mapping
        Its contents, JSON-serialisable; schema, time, versions and digests are added.
    files : mapping
        Path below `root` → SHA-256 of what belongs to the library.

    Raises
    ------
    LibraryError
        If a file is missing.
    """
    missing = [name for name in files if not (root / name).exists()]
    if missing:
        raise LibraryError(f"{root}: {', '.join(missing)} must be on disk before the manifest")
    write_json(
        root / MANIFEST,
        {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **values,
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in _PACKAGES},
            "digests": dict(sorted(files.items())),
        },
    )


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``library.json``.

    Raises
    ------
    LibraryError
        If it is missing, not JSON or of another schema version.
    """
    file = root / MANIFEST
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LibraryError(f"{root} is not a tclora library: it has no {MANIFEST}") from None
    except ValueError as error:
        raise LibraryError(f"{file} must be JSON, but {error}; run the pipeline again") from error
    if values.get("schema") != SCHEMA:
        raise LibraryError(f"{file}: schema must be {SCHEMA}, got {values.get('schema')!r}")
    return values


def verify(root: Path) -> list[str]:
    """List what is missing from a library or differs from its manifest; empty if it is whole."""
    problems = []
    for name, digest in read_manifest(root)["digests"].items():
        if not (root / name).exists():
            problems.append(f"{name} is missing")
        elif sha256_path(root / name) != digest:
            problems.append(f"{name} differs from its digest in {MANIFEST}")
    return problems


def prune(root: Path, folders: Iterable[str], keep: Iterable[str]) -> list[str]:
    """Remove what an earlier run left in the given folders; return the removed names.

    Parameters
    ----------
    root : Path
        The library directory.
    folders : iterable of str
        Folders of `root` to tidy, such as "adapters".
    keep : iterable of str
        Paths below `root` that belong to the library.

    Notes
    -----
    Only what the manifest of the earlier run lists is removed, never a user's own file.
    """
    if not (root / MANIFEST).exists():
        return []
    ours = set(read_manifest(root)["digests"])
    kept = set(keep)
    removed = []
    for folder in folders:
        for path in sorted((root / folder).glob("*")):
            name = path.relative_to(root).as_posix()
            if name in ours - kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(name)
    return removed


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
