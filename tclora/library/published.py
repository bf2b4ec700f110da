"""Libraries in a store, where any machine can read them: put there and fetched as a whole.

::

    libraries/NAME.json    a library's files by name, with digest and size; written last
    objects/ab/abcd…       their bytes

A library changes in a store by its record alone, so that a reader finds the former one or the new
one, and never a part. What jobs have put into the same store is not put there again.
"""

from pathlib import Path

from tclora.errors import ConfigError, LibraryError
from tclora.files import sha256_json
from tclora.jobs.devices import exclusive
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.model.place import cache_dir
from tclora.store.cache import Cache
from tclora.store.objects import Store
from tclora.store.trees import Tree
from tclora.store.url import check_url

_FOLDER = "libraries"


def put_library(root: Path, url: str) -> str:
    """Put a finished library into a store.

    Parameters
    ----------
    root : Path
        The library directory.
    url : str
        Of the store; any of fsspec's file systems.

    Returns
    -------
    str
        What `library_folder` takes: the store's URL and the library's name.

    Raises
    ------
    LibraryError
        If it is incomplete here; the store keeps what it has of it.
    StoreError
        If the store cannot be written.
    """
    layout, store = Layout(root), Store(url)
    files = [layout.path(name) for name in read_manifest(root).digests]
    files += [file for file in (layout.manifest, layout.report) if file.exists()]
    if missing := [layout.name(file) for file in files if not file.is_file()]:
        raise LibraryError(
            f"{root}: {', '.join(missing)} must be there before it is published; run the pipeline "
            "again"
        )
    blobs = {layout.name(file): store.push(file) for file in files}
    tree = Tree(files={name: found.file for name, found in blobs.items() if found and found.file})
    store.write(_record(root.name), tree.model_dump_json().encode())
    return f"{store.url}/{root.name}"


def library_folder(place: str | Path) -> Path:
    """Return the folder of a library: the one that is named, or a copy of one in a store.

    Parameters
    ----------
    place : str or Path
        A folder, or what `put_library` has returned, such as ``"s3://bucket/prefix/NAME"``.

    Raises
    ------
    ConfigError
        If it is no valid URL.
    LibraryError
        If the store holds no such library.
    StoreError
        If the store cannot be read, or lacks a file of the library.

    Notes
    -----
    Copies lie in the cache folder; every file of one is compared with its digest each time.
    """
    if "://" not in str(place):
        return Path(place)
    url, _, name = check_url(str(place), "library").rpartition("/")
    if url.endswith(":/"):
        raise ConfigError(
            "library must be a store's URL and a name, such as s3://bucket/runs/demo, got "
            f"{str(place)!r}"
        )
    store = Store(url)
    record = store.read(_record(name))
    if record is None:
        known = ", ".join(sorted(published(store))) or "none"
        raise LibraryError(
            f"{place} must be a library that a run has published (publish_to={url}), but the store "
            f"has no {name}; it has: {known}"
        )
    tree = Tree.model_validate_json(record)
    copy = cache_dir() / _FOLDER / sha256_json(store.url)[:16] / name
    with exclusive(copy.with_name(f".{name}.lock")):
        if Tree.of(copy) != tree:
            Cache(cache_dir() / "objects", store).place(tree, copy)
        copy.touch()  # used now, for `tclora gc`
    return copy


def published(store: Store) -> dict[str, Tree]:
    """Return the libraries of a store by name."""
    found = {}
    for entry, _ in store.names(_FOLDER):
        record = store.read(entry)
        if record is not None:  # it may be removed meanwhile
            found[Path(entry).stem] = Tree.model_validate_json(record)
    return found


def _record(name: str) -> str:
    return f"{_FOLDER}/{name}.json"
