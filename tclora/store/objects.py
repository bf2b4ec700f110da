"""A store of files by their digests, and of small records by name, on any fsspec URL.

::

    objects/ab/abcd…       bytes whose SHA-256 is abcd…
    jobs/KEY/…             records of a job; see `tclora.jobs.remote`
    runs/NAME-DIGEST/…     records of a run's stages; see `tclora.store.stages`
    libraries/NAME.json    a finished library; see `tclora.library.published`

An object appears whole or not at all. What fails for a while is tried again with growing pauses.
"""

import errno
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tclora.errors import ConfigError, StoreError
from tclora.store.trees import Blob, Tree
from tclora.store.url import check_url

R = TypeVar("R")
_Errors = tuple[type[Exception], ...]
_PAUSES = (0.5, 1, 2, 4, 8, 16, 32, 64)  # s between attempts
# Errors that another attempt would only repeat.
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


class Store:
    """Objects and records below a URL.

    Parameters
    ----------
    url : str
        Where; see `tclora.store.url.check_url`. Credentials come from the environment, as fsspec's
        file systems read it.
    pauses : tuple of float
        Waits between attempts (s) at what fails for a while.

    Attributes
    ----------
    failures : tuple of type
        What is raised where the store cannot be used.

    Raises
    ------
    ConfigError
        If the URL is not valid, or the package of its file system is not installed.
    """

    def __init__(self, url: str, pauses: tuple[float, ...] = _PAUSES) -> None:
        self.url = check_url(url)
        self._pauses = pauses
        # Listings that are remembered would hide what another machine has just written.
        options = {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            fs, root = fsspec.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"store {self.url!r} cannot be opened: {error}; for s3:// install tclora[s3]"
            ) from error
        self._fs: Any = fs
        self._root: str = root.rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)
        passing, final = _client_errors(fs)
        self._passing: _Errors = (OSError, *passing)
        self._final: _Errors = (*_FINAL, *final)
        self.failures: _Errors = (StoreError, *self._passing, *self._final)

    def push(self, path: Path) -> Tree | None:
        """Store a file, or all files of a folder, that are not there yet.

        Returns
        -------
        Tree or None
            What was at the path; None if nothing was.
        """
        tree = Tree.of(path)
        for file, blob in tree.below(path).items() if tree else ():
            self.put(file, blob)
        return tree

    def put(self, file: Path, blob: Blob) -> None:
        """Store one file, if it is not there yet."""
        if not self.holds(blob):
            self._retried(partial(self._upload, file, _object(blob.digest)))

    def holds(self, blob: Blob) -> bool:
        """Return whether there is such an object."""
        return self._retried(partial(self._size, _object(blob.digest))) == blob.size

    def get(self, blob: Blob, target: Path) -> None:
        """Download one object to a path that does not exist; its digest is not compared here.

        Raises
        ------
        StoreError
            If the store has no such object.
        """
        place = self._place(_object(blob.digest))
        try:
            self._retried(lambda: self._fs.get_file(place, str(target)))
        except FileNotFoundError:
            raise StoreError(
                f"store {self.url} must hold object {blob.digest[:12]} ({blob.size} bytes), but "
                "does not; run again: what is missing is made anew"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a small record; it appears whole."""

        def attempt() -> None:
            place, fresh = self._place(name), self._fresh(name)
            self._make_folder(place)
            self._fs.pipe_file(fresh, content)
            if fresh != place:
                self._fs.mv(fresh, place)

        self._retried(attempt)

    def read(self, name: str) -> bytes | None:
        """Read a record; None if there is none."""
        try:
            content: bytes = self._retried(lambda: self._fs.cat_file(self._place(name)))
        except FileNotFoundError:
            return None
        return content

    def names(self, below: str) -> Iterator[tuple[str, int]]:
        """Yield names of records or objects below a name, with their sizes (bytes)."""
        yield from ((name, size) for name, size, _ in self.entries(below))

    def entries(self, below: str) -> Iterator[tuple[str, int, float]]:
        """Yield names, sizes (bytes) and times of writing (s since 1970) of all below a name."""
        found = self._retried(lambda: self._fs.find(self._place(below), detail=True))
        for place, info in sorted(found.items()):
            written = info.get("mtime") or info["LastModified"].timestamp()
            yield place.removeprefix(f"{self._root}/"), int(info["size"] or 0), float(written)

    def remove(self, name: str) -> None:
        """Remove a record, an object, or all below a name."""
        try:
            self._retried(lambda: self._fs.rm(self._place(name), recursive=True))
        except FileNotFoundError:
            return

    def check(self) -> None:
        """Write, read and remove a record.

        Raises
        ------
        StoreError
            If that does not work.
        """
        name = f"jobs/.check-{uuid.uuid4().hex}"
        try:
            self.write(name, b"tclora")
            found = self.read(name)
            self.remove(name)
        except self._passing as error:
            raise StoreError(
                f"store {self.url} must be writable, but {type(error).__name__}: {error}; check "
                "the place and its credentials"
            ) from error
        if found != b"tclora":
            raise StoreError(f"store {self.url} must give back what was written, got {found!r}")

    def _size(self, name: str) -> int | None:
        try:
            return int(self._fs.info(self._place(name))["size"])
        except FileNotFoundError:
            return None

    def _upload(self, file: Path, name: str) -> None:
        place, fresh = self._place(name), self._fresh(name)
        self._make_folder(place)
        self._fs.put_file(str(file), fresh)  # object stores: in parts, and seen when complete
        if fresh != place:
            self._fs.mv(fresh, place)

    def _fresh(self, name: str) -> str:
        """Return where to write: on a disk beside the place, to be renamed to it."""
        place = self._place(name)
        return f"{place}.{uuid.uuid4().hex}.part" if self._local else place

    def _make_folder(self, place: str) -> None:
        if self._local:
            self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retried(self, attempt: Callable[[], R]) -> R:
        for pause in self._pauses:
            try:
                return attempt()
            except self._final:
                raise
            except self._passing as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                time.sleep(pause)
        return attempt()


def _object(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def _client_errors(fs: Any) -> tuple[_Errors, _Errors]:  # noqa: ANN401
    """Return what a client raises where network or service fail, and what is final of it."""
    if "s3" not in fs.protocol:
        return (), ()
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    final = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
    return (BotoCoreError, ClientError), final
