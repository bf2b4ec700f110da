"""A finished library changes only as a whole: a run works in a staging area beside it.

``.NAME.staging`` starts with hard links to the finished library's files, so that what a run need
not make again costs nothing; whatever it writes, it writes anew and renames, which leaves the
finished library's own bytes alone. At the end the two are exchanged by two renames. A run that is
interrupted leaves its staging area behind, and the next one goes on from there.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from tclora.errors import LibraryError
from tclora.files import link_file, sha256_path, sha256_paths
from tclora.library.layout import Layout
from tclora.library.manifest import is_listed, read_manifest
from tclora.library.places import heal, retired, staging_area
from tclora.library.records import Manifest


def begin(root: Path) -> Path:
    """Return the staging area of a library, ready for a run.

    Parameters
    ----------
    root : Path
        The library directory; it need not exist.

    Returns
    -------
    Path
        What an interrupted run left; else links to (or copies of) what the finished library holds;
        without manifest and report. What the finished library lists but has lost, or what was
        changed in it, is missing here too, unless an interrupted run has made it anew.

    Raises
    ------
    LibraryError
        If the library is no folder, or its manifest cannot be read.

    Notes
    -----
    One run at a time: the caller holds the library's lock. Every file that the finished library
    lists is read once, to compare its digest.
    """
    root = root.absolute()
    if root.exists() and not root.is_dir():
        raise LibraryError(f"{root} must be a folder, but is a file; move it away")
    heal(root)
    _discard(retired(root))
    staging = staging_area(root)
    manifest = _manifest(root)
    damaged = _damaged(root, manifest) if manifest else {}
    if staging.exists():
        _lose(damaged, root, staging)
    else:
        _copy_finished(root, manifest, damaged, staging)
    layout = Layout(staging)
    layout.manifest.unlink(missing_ok=True)
    layout.report.unlink(missing_ok=True)
    return staging


def publish(staging: Path, root: Path) -> None:
    """Put a finished staging area in the library's place.

    Parameters
    ----------
    staging : Path
        From `begin`, with everything its manifest names.
    root : Path
        The library directory.

    Raises
    ------
    LibraryError
        If the manifest, or a file it names, is missing; the library is as it was.

    Notes
    -----
    What the manifest does not name is left behind, but for the work area. A user's own files, those
    that the former library's manifest does not name, move on into the new one, where nothing of
    the new one has their name.
    """
    root, staging = root.absolute(), staging.absolute()
    manifest = read_manifest(staging)
    if missing := [name for name in manifest.digests if not Layout(staging).path(name).is_file()]:
        raise LibraryError(
            f"{staging}: {', '.join(missing)} must be on disk before the library is published; "
            "run the pipeline again"
        )
    _prune(staging, manifest)
    former = _manifest(root)
    for file in list(_files(root)):
        if not _is_ours(root, former, file):
            _carry_over(file, staging / file.relative_to(root), staging)
    _exchange(staging, root.resolve(), retired(root))


def _exchange(staging: Path, place: Path, old: Path) -> None:
    _discard(old)
    if place.exists():
        place.rename(old)
    try:
        staging.rename(place)
    except FileNotFoundError:
        if not Layout(place).manifest.exists():  # else a reader came between and put it there
            raise
    _discard(old)


def _discard(old: Path) -> None:
    """Remove a former library, its manifest first, so that no part of it passes for a whole."""
    Layout(old).manifest.unlink(missing_ok=True)
    if old.exists():
        shutil.rmtree(old)


def _manifest(root: Path) -> Manifest | None:
    return read_manifest(root) if Layout(root).manifest.exists() else None


def _damaged(root: Path, manifest: Manifest) -> dict[str, str]:
    """Return what a library lists but has lost, or what was changed in it, with its digest."""
    there = [name for name in manifest.digests if Layout(root).path(name).exists()]
    found = dict(zip(there, sha256_paths(map(Layout(root).path, there)), strict=True))
    return {name: d for name, d in manifest.digests.items() if found.get(name) != d}


def _copy_finished(
    root: Path, manifest: Manifest | None, damaged: Mapping[str, str], staging: Path
) -> None:
    """Make the staging area appear at once, so that half of one is never gone on from."""
    fresh = staging.with_name(f"{staging.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if manifest:
        kept = {name: d for name, d in manifest.digests.items() if name not in damaged}
        sound = manifest.model_copy(update={"digests": kept})
        for file in _files(root):
            if _is_ours(root, sound, file):
                _link(file, fresh / file.relative_to(root))
    fresh.rename(staging)


def _lose(damaged: Mapping[str, str], root: Path, staging: Path) -> None:
    """Remove copies of what the library has lost; what a run has made anew is no copy."""
    for name, digest in damaged.items():
        there, here = Layout(root).path(name), Layout(staging).path(name)
        if here.exists() and (_shared(there, here) or sha256_path(here) == digest):
            _remove(here, staging)


def _shared(there: Path, here: Path) -> bool:
    """Whether two files, or files of two folders, are the same one on disk."""
    if there.is_file() and here.is_file():
        return there.samefile(here)
    ours = (path for path in _files(here) if (there / path.relative_to(here)).is_file())
    return any(path.samefile(there / path.relative_to(here)) for path in ours)


def _is_ours(root: Path, manifest: Manifest | None, file: Path) -> bool:
    """Whether a run has written a file; without a manifest that cannot be told of any."""
    layout = Layout(root)
    if manifest is None:
        return False
    if file in (layout.manifest, layout.report) or file.is_relative_to(layout.work):
        return True
    return is_listed(root, manifest, file)


def _prune(staging: Path, manifest: Manifest) -> None:
    for file in list(_files(staging)):
        if not _is_ours(staging, manifest, file):
            _remove(file, staging)


def _carry_over(file: Path, target: Path, staging: Path) -> None:
    """Link a user's file, unless the new library has a file there, or in place of its folder."""
    taken = target.exists() or any(
        folder.is_file() for folder in target.parents if folder.is_relative_to(staging)
    )
    if not taken:
        _link(file, target)


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    link_file(file, target)


def _files(root: Path) -> Iterator[Path]:
    """Yield files and symbolic links below a folder; folders behind links are left alone."""
    for path in root.rglob("*"):
        if path.is_symlink() or path.is_file():
            yield path


def _remove(path: Path, staging: Path) -> None:
    """Remove a file or folder, and the folders below the staging area that it leaves empty."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in path.parents:
        if folder == staging or any(folder.iterdir()):
            return
        folder.rmdir()
