"""Interim."""

import os
import shutil
from pathlib import Path


def begin(root: Path) -> Path:
    """Interim."""
    staging = root.with_name(f".{root.name}.staging")
    if not staging.exists() and root.exists():
        shutil.copytree(root, staging, copy_function=os.link)
        (staging / "library.json").unlink(missing_ok=True)
        (staging / "report.html").unlink(missing_ok=True)
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def publish(staging: Path, root: Path) -> None:
    """Interim."""
    old = root.with_name(f".{root.name}.old")
    if root.exists():
        root.rename(old)
    staging.rename(root)
    shutil.rmtree(old, ignore_errors=True)
