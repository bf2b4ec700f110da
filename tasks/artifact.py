"""What tasks hand to each other: small references to files on disk, checked by digest.

Prefect stores a returned `Artifact` as JSON; reading it back validates that every file still exists
with its digest, so a deleted or corrupt file counts as a miss.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from tclora.files import link_path, sha256_json, sha256_path, sha256_paths


class Artifact(BaseModel):
    """Files a stage has written, with their digests.

    Attributes
    ----------
    root : Path
        The staging area of the library.
    files : dict
        Path below `root` (a file or a folder) → SHA-256.
    metrics : dict
        Figures to log.
    info : dict
        Whatever else later stages and the report need; JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    files: dict[str, str]
    metrics: dict[str, float] = {}
    info: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_files(self) -> "Artifact":
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"{path} does not exist any more")
        found = sha256_paths(self.paths)
        for path, now, digest in zip(self.paths, found, self.files.values(), strict=True):
            if now != digest:
                raise ValueError(f"{path} has changed since it was written")
        return self

    @classmethod
    def of(
        cls,
        root: Path,
        *paths: Path,
        metrics: Mapping[str, float] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Artifact":
        """Make a reference to files just written below `root`."""
        files = {path.relative_to(root).as_posix(): sha256_path(path) for path in paths}
        return cls(root=root, files=files, metrics=dict(metrics or {}), info=dict(info or {}))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return tuple(self.root / name for name in self.files)

    @property
    def path(self) -> Path:
        """The first file."""
        return self.paths[0]

    def alone(self) -> "Artifact":
        """Return a reference to the first file only, for stages that depend on nothing else."""
        name = next(iter(self.files))
        return Artifact.model_construct(root=self.root, files={name: self.files[name]})

    def linked(self, root: Path) -> "Artifact":
        """Return the same files below another root, linked there unless they are there already."""
        for name, digest in self.files.items():
            target = root / name
            if not target.exists() or sha256_path(target) != digest:
                link_path(self.root / name, target)
        return self.model_copy(update={"root": root})

    @property
    def digest(self) -> str:
        """Digest over all files."""
        return sha256_json(self.files)


Artifacts = dict[str, Artifact]


def paths_of(artifacts: Mapping[str, Artifact]) -> dict[str, Path]:
    """Return the first file of every artifact."""
    return {name: part.path for name, part in artifacts.items()}
