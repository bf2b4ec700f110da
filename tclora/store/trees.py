"""Files and folders as digests: what travels by name, and where it may be put."""

from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from tclora.files import sha256_file

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _is_inside(name: str) -> str:
    """Refuse a name that could lead out of the folder it is put into."""
    path = PurePosixPath(name)
    strange = "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts
    if strange or path.as_posix() != name or not path.parts:
        raise ValueError(f"a file's name must stay inside of its folder, got {name!r}")
    return name


def _is_plain(name: str) -> str:
    """Refuse a name that is more than one step below a folder."""
    if "/" in _is_inside(name):
        raise ValueError(f"a name must have no folders, got {name!r}")
    return name


InsideName = Annotated[str, AfterValidator(_is_inside)]
PlainName = Annotated[str, AfterValidator(_is_plain)]


class Blob(BaseModel):
    """The bytes of one file: SHA-256 and size (bytes)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Digest
    size: int = Field(ge=0)


class Tree(BaseModel):
    """A file, or the files of a folder.

    Attributes
    ----------
    file : Blob or None
        The file; None for a folder.
    files : dict
        Name below the folder → file. Empty folders do not count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Blob | None = None
    files: dict[InsideName, Blob] = {}

    @classmethod
    def of(cls, path: Path) -> "Tree | None":
        """Describe what is at a path; None if nothing is."""
        if path.is_file():
            return cls(file=_blob(path))
        if not path.is_dir():
            return None
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return cls(files={file.relative_to(path).as_posix(): _blob(file) for file in found})

    def below(self, path: Path) -> dict[Path, Blob]:
        """Return where each file belongs if the tree is at a path."""
        if self.file:
            return {path: self.file}
        return {path / name: blob for name, blob in self.files.items()}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(blob.size for blob in self.below(Path()).values())


def _blob(path: Path) -> Blob:
    return Blob(digest=sha256_file(path), size=path.stat().st_size)
