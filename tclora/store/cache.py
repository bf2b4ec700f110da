"""Copies of a store's objects on this machine, each compared with its digest before it is used."""

import errno
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tclora.errors import StoreError
from tclora.files import atomic_path, link_file, sha256_file
from tclora.store.objects import Store
from tclora.store.trees import Blob, Tree


@dataclass(frozen=True)
class Cache:
    """Files by their digests in a folder, fetched from a store when they are missing.

    Attributes
    ----------
    folder : Path
        Where; made when needed.
    store : Store
        Where they come from.
    """

    folder: Path
    store: Store

    def place(self, tree: Tree, target: Path) -> None:
        """Let a file or folder appear at a path: links to the cache, or copies.

        What was there is replaced. Whoever changes a file must write it anew and rename it, as
        `tclora.files.atomic_path` does; a copy that was changed in place is fetched again.

        Raises
        ------
        StoreError
            If the store lacks an object or holds another one under its name, or the disk is too
            small.
        """
        self._check_space(tree)
        try:
            with atomic_path(target) as fresh:
                if tree.file is None:
                    fresh.mkdir()
                for path, blob in tree.below(fresh).items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    link_file(self._sound(blob), path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StoreError(
                f"{target} must have {tree.size / 1e9:.2f} GB free on its disk, has "
                f"{shutil.disk_usage(target.parent).free / 1e9:.2f}; make room and run again"
            ) from error

    def _sound(self, blob: Blob) -> Path:
        """Return an object's copy that has its digest."""
        place = self._path(blob)
        if place.is_file() and sha256_file(place) == blob.digest:
            place.touch()  # used now, for `tclora gc`
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.folder) as scratch:
            fresh = Path(scratch) / blob.digest
            self.store.get(blob, fresh)
            found = sha256_file(fresh)
            if found != blob.digest:
                raise StoreError(
                    f"store {self.store.url}: object {blob.digest[:12]} must have its digest, got "
                    f"{found[:12]}; remove it there and run again"
                )
            fresh.chmod(0o644)
            fresh.replace(place)
        return place

    def _check_space(self, tree: Tree) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = {b.digest: b.size for b in tree.below(Path()).values() if not self._has(b)}
        needed, free = sum(missing.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"{self.folder} must have {needed / 1e9:.2f} GB free for what a job needs, has "
                f"{free / 1e9:.2f}; make room (`tclora gc`), or set TCLORA_CACHE to a larger disk"
            )

    def _has(self, blob: Blob) -> bool:
        place = self._path(blob)
        return place.is_file() and place.stat().st_size == blob.size

    def _path(self, blob: Blob) -> Path:
        return self.folder / blob.digest[:2] / blob.digest
