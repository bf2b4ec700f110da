"""What may be removed: checkpoints and caches that nobody has used for long, orphans of a store."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tclora.jobs.records import JobRecords
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.places import is_job_store, is_staging
from tclora.library.published import published
from tclora.store.objects import Store
from tclora.store.stages import RUNS, StageRecords


@dataclass(frozen=True)
class Garbage:
    """Something that may be removed.

    Attributes
    ----------
    kind : str
        "checkpoint", "cache", "job", "run" or "object".
    place : str
        Path, or name in the store.
    bytes : int
        Its size.
    remove : callable
        Removes it.
    """

    kind: str
    place: str
    bytes: int
    remove: Callable[[], None]


def local_garbage(output: Path, cache: Path, before: float) -> Iterator[Garbage]:
    """Yield what interrupted runs have left, and copies in the cache that were last used before.

    Parameters
    ----------
    output : Path
        Folder of libraries.
    cache : Path
        The cache folder; see `tclora.model.place.cache_dir`.
    before : float
        Time (s since 1970).

    Yields
    ------
    Garbage
        Whatever is removed is made or fetched again when it is needed.
    """
    stagings = [path for path in _inside(output) if is_staging(path)]
    checkpoints = [part for path in stagings for part in _inside(Layout(path).checkpoints)]
    yield from _unused("checkpoint", checkpoints, before)
    yield from _unused("job", filter(is_job_store, _inside(output)), before)
    objects = (path for part in _inside(cache / "objects") for path in _inside(part))
    copies = (path for path in _inside(cache / "fetched") if path.is_dir())
    libraries = (path for part in _inside(cache / "libraries") for path in _inside(part))
    read = (path for path in libraries if path.is_dir())
    workspaces = (path for path in _inside(cache / "jobs") if path.is_dir())
    for paths in (objects, copies, read, workspaces):
        yield from _unused("cache", paths, before)


def store_garbage(store: Store, libraries: Iterable[Path], before: float) -> Iterator[Garbage]:
    """Yield records of jobs and runs that nobody came back for, and objects that nothing names.

    Parameters
    ----------
    store : Store
        The store.
    libraries : iterable of Path
        Libraries whose manifests name objects to keep; those that are published there are known.
    before : float
        Time (s since 1970); what is newer is kept, it may belong to a run under way.

    Yields
    ------
    Garbage
    """
    kept = {d for root in libraries for d in read_manifest(root).digests.values()}
    kept |= {b.digest for tree in published(store).values() for b in tree.files.values()}
    for key, parts in _by_second_part(store, "jobs").items():
        if max(written for _, written in parts) < before:
            total = sum(size for size, _ in parts)
            yield Garbage("job", f"jobs/{key}", total, JobRecords(store, key).forget)
        else:
            kept |= JobRecords(store, key).digests()
    for run, parts in _by_second_part(store, RUNS).items():
        records = StageRecords(store, run)
        if max(written for _, written in parts) < before:
            yield Garbage("run", f"{RUNS}/{run}", sum(size for size, _ in parts), records.forget)
        else:
            kept |= records.digests()
    for name, size, written in store.entries("objects"):
        if written < before and name.rpartition("/")[2] not in kept:
            yield Garbage("object", name, size, partial(store.remove, name))


def _by_second_part(store: Store, below: str) -> dict[str, list[tuple[int, float]]]:
    """Return sizes (bytes) and times of writing (s) of records, by the folder they are in."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, size, written in store.entries(below):
        found.setdefault(name.split("/")[1], []).append((size, written))
    return found


def _unused(kind: str, paths: Iterable[Path], before: float) -> Iterator[Garbage]:
    for path in paths:
        files = [path, *(path.rglob("*") if path.is_dir() else ())]
        used = max(file.stat().st_mtime for file in files)
        if used < before:
            size = sum(file.stat().st_size for file in files if file.is_file())
            yield Garbage(kind, str(path), size, partial(_remove, path))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
