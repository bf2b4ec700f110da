"""Adapter directories as the command line takes them: opened by name, never overwritten blindly."""

from collections.abc import Sequence
from pathlib import Path

from tclora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    locate_adapter,
    read_adapter,
)
from tclora.errors import AdapterError


def read_adapters(specs: Sequence[str]) -> list[Adapter]:
    """Open PEFT directories or hub ids, named after their folders, with parents if need be."""
    paths = [locate_adapter(spec) for spec in specs]
    names = [Path(spec).name for spec in specs]
    unique = [
        name if names.count(name) == 1 else f"{Path(spec).parent.name}-{name}"
        for name, spec in zip(names, specs, strict=True)
    ]
    return [read_adapter(path, name) for path, name in zip(paths, unique, strict=True)]


def check_target(target: Path) -> None:
    """Refuse to replace a directory that is more than an adapter.

    Raises
    ------
    AdapterError
        If `target` is a file, or a directory that holds anything but one PEFT adapter.
    """
    if not target.exists():
        return
    ours = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    others = [] if target.is_dir() else [target]
    others += [path for path in target.glob("*") if path.name not in ours]
    if others:
        raise AdapterError(
            f"--output {str(target)!r} must be a new directory or one that holds an adapter alone, "
            f"but {others[0].name!r} is there; name another one"
        )
