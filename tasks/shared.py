"""Results that more than one run has a use for: taken over, not made again.

A run leaves a record of every stage: what it was given, by digests and without places, and the
files that came of it. Another run that would do the same takes them over, if they are still there
and unchanged. The cells of a study share in a folder. A run with a store keeps its own there until
it has ended well, so that it can go on on another machine. Other runs share nothing, and a run that
finds its finished library takes nothing from the store, so that what was deleted from a library is
made anew (ADR 2).
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefect import get_run_logger
from pydantic import TypeAdapter, ValidationError

from tasks.artifact import Artifact, Artifacts
from tclora.config import Config
from tclora.files import atomic_path, write_text
from tclora.library.layout import Layout
from tclora.model.place import cache_dir
from tclora.store.objects import Store
from tclora.store.stages import StageRecords

Result = Artifact | Artifacts
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)
_ALONE = ""  # name of an artifact that is the only one


class Shared(Protocol):
    """Where stages leave what they have made.

    Attributes
    ----------
    failures : tuple of type
        What is raised where that place cannot be used; a run does without it then.
    """

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What is raised where that place cannot be used."""

    def record(self, key: str, result: Result) -> None:
        """Note what a stage of this key has made."""

    def take_over(self, key: str, root: Path) -> Result | None:
        """Put what a stage of this key has made below a root; None if there is nothing."""


@dataclass(frozen=True)
class LinkedStages:
    """Records in a folder, for runs on one disk: files are linked.

    Attributes
    ----------
    folder : Path
        Of the records; files stay in the libraries.
    """

    folder: Path
    failures: tuple[type[Exception], ...] = ()

    def record(self, key: str, result: Result) -> None:
        """See `Shared`."""
        write_text(self.folder / f"{key}.json", _RESULT.dump_json(result).decode())

    def take_over(self, key: str, root: Path) -> Result | None:
        """See `Shared`."""
        file = self.folder / f"{key}.json"
        if not file.exists():
            return None
        try:
            found = _RESULT.validate_json(file.read_bytes())
        except ValidationError:  # its files are gone or changed
            return None
        if isinstance(found, Artifact):
            return _linked(found, root)
        return {name: _linked(part, root) for name, part in found.items()}


@dataclass(frozen=True)
class StoredStages:
    """Records in a store, files as its objects, for a run that goes on where its folder is not.

    Attributes
    ----------
    records : StageRecords
        Of the run.
    reads : bool
        Whether anything is taken over.
    """

    records: StageRecords
    reads: bool = True

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """See `Shared`."""
        return self.records.store.failures

    def record(self, key: str, result: Result) -> None:
        """See `Shared`."""
        parts = {_ALONE: result} if isinstance(result, Artifact) else result
        files = {name: part.root / name for part in parts.values() for name in part.files}
        described = {
            name: part.model_dump(mode="json", exclude={"root"}) for name, part in parts.items()
        }
        self.records.keep(key, files, described)

    def take_over(self, key: str, root: Path) -> Result | None:
        """See `Shared`."""
        found = self.records.place(key, root, cache_dir() / "objects") if self.reads else None
        if found is None:
            return None
        try:
            parts = {name: Artifact(root=root, **part) for name, part in found.items()}
        except ValidationError:  # another version's, or a figure that JSON does not have
            return None
        return parts.get(_ALONE, parts)


def stored_stages(config: Config) -> list[Shared]:
    """Return where a run keeps what its stages make until it has ended well, if it has a store."""
    if not config.execution.store:
        return []
    store = Store(config.execution.store)
    finished = Layout(config.library_dir).manifest.exists()
    return [StoredStages(StageRecords.of_library(store, config.library_dir), reads=not finished)]


def forget_stages(config: Config) -> None:
    """Remove the records of a run that has ended well, and of its further training seeds."""
    if not config.execution.store:
        return
    store = Store(config.execution.store)
    for part in (config, *config.replicas()):
        try:
            StageRecords.of_library(store, part.library_dir).forget()
        except store.failures as error:
            message = "records of %s stay in %s until `tclora gc` removes them: %s"
            get_run_logger().warning(message, part.name, store.url, error)


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
