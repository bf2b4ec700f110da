"""What a store keeps of the stages of a run, so that the run can go on on another machine.

::

    runs/NAME-DIGEST/KEY.json     what a stage of this key has made; its files are objects

They are there while the run may be interrupted; see `StageRecords.forget`. Whoever runs under the
same name at the same path with the same store goes on with them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tclora.files import sha256_json
from tclora.store.cache import Cache
from tclora.store.objects import Store
from tclora.store.trees import Blob, InsideName, Tree

RUNS = "runs"
_SUFFIX = ".json"  # what has another is being written


class StageRecord(BaseModel):
    """What a stage has made.

    Attributes
    ----------
    files : dict of str to Tree
        Name below the run's folder → file or folder.
    result : Any
        What the stage has returned; JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[InsideName, Tree]
    result: Any

    @property
    def blobs(self) -> Iterator[Blob]:
        """All files as objects."""
        return (blob for tree in self.files.values() for blob in tree.below(Path()).values())


@dataclass(frozen=True)
class StageRecords:
    """The records of one run's stages.

    Attributes
    ----------
    store : Store
        Where they are.
    run : str
        Names the run; see `of_library`.
    """

    store: Store
    run: str

    @classmethod
    def of_library(cls, store: Store, library: Path) -> "StageRecords":
        """Return the records of runs that make the library of this name and place."""
        return cls(store, f"{library.name}-{sha256_json(str(library))[:12]}")

    def keep(self, key: str, files: Mapping[str, Path], result: Any) -> None:  # noqa: ANN401
        """Put what a stage has made into the store, by names below its root; the record is last."""
        trees = {name: self.store.push(path) for name, path in files.items()}
        record = StageRecord(files=trees, result=result)
        self.store.write(self._name(key), record.model_dump_json().encode())

    def place(self, key: str, root: Path, cache: Path) -> Any:  # noqa: ANN401
        """Put what a stage has made below another root, by way of a folder of copies.

        Returns
        -------
        Any
            What the stage had returned; None if there is no record of this version, or an object is
            gone.

        Raises
        ------
        StoreError
            If an object has not its digest, or the disk is too small.
        """
        record = self._read(self._name(key))
        if record is None or not all(map(self.store.holds, record.blobs)):
            return None
        copies = Cache(cache, self.store)
        for name, tree in record.files.items():
            copies.place(tree, root / name)
        return record.result

    def digests(self) -> set[str]:
        """Return the digests of all objects that the records name."""
        names = [name for name, _ in self.store.names(f"{RUNS}/{self.run}")]
        records = [self._read(name) for name in names if name.endswith(_SUFFIX)]
        return {blob.digest for record in records if record for blob in record.blobs}

    def forget(self) -> None:
        """Remove all records; objects stay, for others that need them."""
        self.store.remove(f"{RUNS}/{self.run}")

    def _read(self, name: str) -> StageRecord | None:
        found = self.store.read(name)
        if found is None:
            return None
        try:
            return StageRecord.model_validate_json(found)
        except ValidationError:  # another version's
            return None

    def _name(self, key: str) -> str:
        return f"{RUNS}/{self.run}/{key}{_SUFFIX}"
