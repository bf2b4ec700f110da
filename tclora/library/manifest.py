"""The library directory's manifest on disk: written last, read checked, compared with the files."""

import json
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from tclora.errors import LibraryError
from tclora.files import sha256_path, sha256_paths, write_json
from tclora.library.layout import Layout
from tclora.library.places import heal
from tclora.library.previous import upgrade
from tclora.library.records import SCHEMA, Description, Manifest

_PACKAGES = (
    "tclora", "torch", "transformers", "peft", "sentence-transformers", "scikit-learn",
    "hdbscan", "tensorly", "prefect", "mlflow",
)  # fmt: skip
_WITHOUT = "restore it, or remove it and run the pipeline again"
_REMEDY = "put it back, or run the pipeline again: it makes anew what is missing or differs"


def write_manifest(root: Path, description: Description, names: Iterable[str]) -> Manifest:
    """Write ``library.json`` once everything it names is on disk.

    Parameters
    ----------
    root : Path
        The library directory, or its staging area.
    description : Description
        What the run says; schema, time, versions and digests are added.
    names : iterable of str
        Names below `root` of the files and folders that belong to the library; every file of a
        folder is listed with a digest of its own.

    Returns
    -------
    Manifest

    Raises
    ------
    LibraryError
        If something named is missing.
    """
    layout = Layout(root)
    wanted = sorted(set(names))
    if missing := [name for name in wanted if not layout.path(name).exists()]:
        raise LibraryError(f"{root}: {', '.join(missing)} must be on disk before the manifest")
    files = sorted({layout.name(file) for name in wanted for file in _files(layout.path(name))})
    manifest = Manifest(
        **dict(description),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        digests=dict(zip(files, sha256_paths(map(layout.path, files)), strict=True)),
    )
    values = manifest.model_dump(mode="json", by_alias=True)
    first = {key: values[key] for key in ("schema", "created")}
    write_json(layout.manifest, first | values)
    return manifest


def read_manifest(root: Path) -> Manifest:
    """Read ``library.json``, also of the previous version.

    Raises
    ------
    LibraryError
        If it is missing, incomplete, not JSON or of another schema version.
    """
    file = Layout(root).manifest
    if not file.exists():
        heal(root)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise LibraryError(
            f"{root} is not a tclora library: it has no {file.name}; run the pipeline to its end, "
            "or name the library's directory"
        ) from None
    except ValueError as error:
        raise LibraryError(f"{file} must be JSON, but {error}; {_WITHOUT}") from error
    return _parse(file, values)


def verify(root: Path) -> list[str]:
    """List what is missing from a library or differs from its manifest; empty if it is whole.

    Raises
    ------
    LibraryError
        If there is no manifest to compare with.
    """
    found = (_problem(root, *listed) for listed in read_manifest(root).digests.items())
    return [problem for problem in found if problem]


def check_listed(root: Path, manifest: Manifest, path: Path) -> None:
    """Check a file or folder of a library against its manifest, before it is read.

    Raises
    ------
    LibraryError
        If it is missing, not listed, or not the one that is listed: a mixture of two runs. The
        message names the file.
    """
    name = Layout(root).name(path)
    listed = {known: digest for known, digest in manifest.digests.items() if _within(known, name)}
    if not listed:
        listing = Layout(root).manifest.name
        raise LibraryError(f"{path} does not belong to the library: {listing} has no {name}")
    for known, digest in listed.items():
        if problem := _problem(root, known, digest):
            raise LibraryError(f"{root}: {problem}; {_REMEDY}")


def is_listed(root: Path, manifest: Manifest, file: Path) -> bool:
    """Whether a file belongs to a library, by its own name or by that of its folder."""
    name = PurePosixPath(Layout(root).name(file))
    return any(str(known) in manifest.digests for known in (name, *name.parents))


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in _files(path))


def _parse(file: Path, values: Any) -> Manifest:  # noqa: ANN401
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema not in (SCHEMA - 1, SCHEMA):
        raise LibraryError(
            f"{file}: schema must be {SCHEMA - 1} or {SCHEMA}, got {schema!r}; open it with the "
            f"version of tclora that wrote it; {_WITHOUT}"
        )
    try:
        return Manifest.model_validate(values if schema == SCHEMA else upgrade(values))
    except ValidationError as error:
        places = [".".join(map(str, problem["loc"])) for problem in error.errors()]
        raise LibraryError(
            f"{file} must be complete, but these are missing or wrong: {', '.join(places)}; "
            f"{_WITHOUT}"
        ) from error


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from (file for file in path.rglob("*") if file.is_file())


def _within(known: str, name: str) -> bool:
    """Whether what is listed as `known` is `name`, a part of it or the folder that holds it."""
    return known == name or known.startswith(f"{name}/") or name.startswith(f"{known}/")


def _problem(root: Path, name: str, digest: str) -> str:
    path = Layout(root).path(name)
    if not path.exists():
        return f"{name} is missing"
    if sha256_path(path) != digest:
        return f"{name} differs from its digest in {Layout(root).manifest.name}"
    return ""
