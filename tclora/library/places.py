"""The folders beside a library in which a run works, and the end of an interrupted exchange."""

from pathlib import Path

from tclora.library.layout import Layout


def staging_area(root: Path) -> Path:
    """Return the folder in which a run prepares the library `root`."""
    return _beside(root, "staging")


def is_staging(path: Path) -> bool:
    """Whether a folder is the staging area of a library beside it."""
    return _is_beside(path, "staging")


def job_store(root: Path) -> Path:
    """Return the folder through which a run exchanges files with workers that see it too."""
    return _beside(root, "store")


def is_job_store(path: Path) -> bool:
    """Whether a folder is the job store of a library beside it."""
    return _is_beside(path, "store")


def retired(root: Path) -> Path:
    """Return the folder that holds the former library while the new one takes its place."""
    return _beside(root, "old")


def heal(root: Path) -> bool:
    """Finish an exchange of libraries that was interrupted between its two renames.

    Readers call it before they say that there is no library.

    Returns
    -------
    bool
        Whether the library was put in its place.

    Notes
    -----
    Only then there is a former library and none in its place. The new one is complete at that
    time; the former one is the way back if someone has removed it. A manifest tells that either
    is whole: it is the last file to be written and the first to be removed.
    """
    place = root.resolve()
    if place.exists() or not retired(root).exists():
        return False
    for whole in (staging_area(root), retired(root)):
        if Layout(whole).manifest.exists():
            whole.rename(place)
            return True
    return False


def _beside(root: Path, suffix: str) -> Path:
    place = root.resolve()  # a link stays one; what it points to is exchanged
    return place.with_name(f".{place.name}.{suffix}")


def _is_beside(path: Path, suffix: str) -> bool:
    name = path.name.removeprefix(".").removesuffix(f".{suffix}")
    return path.is_dir() and path.name == f".{name}.{suffix}"
