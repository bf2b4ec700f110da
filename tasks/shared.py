"""Results that runs on several libraries have in common: linked, not made again.

A run that shares leaves a record of every stage: what it was given, by digests and without places,
and the files that came of it. Another run that would do the same takes them over, if they are still
there and unchanged. Studies share among their cells; other runs share nothing, so that what was
deleted from a library is made anew (ADR 2).
"""

import os
import shutil
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tasks.artifact import Artifact, Artifacts
from tclora.files import atomic_path, write_text

Result = Artifact | Artifacts
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


def record(folder: Path, key: str, result: Result) -> None:
    """Note what a stage of this key has made."""
    write_text(folder / f"{key}.json", _RESULT.dump_json(result).decode())


def take_over(folder: Path, key: str, root: Path) -> Result | None:
    """Link what another run's stage of this key has made below a root; None if there is nothing."""
    file = folder / f"{key}.json"
    if not file.exists():
        return None
    try:
        found = _RESULT.validate_json(file.read_bytes())
    except ValidationError:  # its files are gone or changed
        return None
    if isinstance(found, Artifact):
        return _linked(found, root)
    return {name: _linked(part, root) for name, part in found.items()}


def _linked(artifact: Artifact, root: Path) -> Artifact:
    for name, path in zip(artifact.files, artifact.paths, strict=True):
        if root / name == path:
            continue
        with atomic_path(root / name) as fresh:
            if path.is_dir():
                shutil.copytree(path, fresh, copy_function=_link)
            else:
                _link(path, fresh)
    return artifact.model_copy(update={"root": root})


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
