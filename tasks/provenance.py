"""Where a run comes from: the code and its version, the environment, and who has started it."""

import getpass
import os
import platform
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

import tclora
from tclora.files import sha256_file, sha256_json

_ROOT = Path(tclora.__file__).parents[1]
_PACKAGES = ("tclora", "tasks", "flows")


def code_tags() -> dict[str, str]:
    """Return MLflow tags of what a run executes, and of who runs it.

    A commit is named only where the code is a git checkout of its own; the digest, which is of all
    source files, tells changes that are not committed, and installed packages, apart too.
    """
    tags = {
        MLFLOW_SOURCE_NAME: Path(sys.argv[0]).name,
        MLFLOW_SOURCE_TYPE: "LOCAL",
        MLFLOW_USER: _user(),
        "tclora.version": tclora.__version__,
        "tclora.source_sha256": source_sha256(),
    }
    commit = get_git_commit(str(_ROOT)) if (_ROOT / ".git").exists() else None
    return tags | ({MLFLOW_GIT_COMMIT: commit} if commit else {})


@cache
def source_sha256() -> str:
    """Return the SHA-256 over the paths and contents of all source files."""
    files = sorted(file for name in _PACKAGES for file in (_ROOT / name).rglob("*.py"))
    return sha256_json({str(file.relative_to(_ROOT)): sha256_file(file) for file in files})


@cache
def environment() -> dict[str, Any]:
    """Return what this machine has: Python, system, devices, packages with their versions."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    metadata = [distribution.metadata for distribution in distributions()]
    found = {of["Name"]: of["Version"] for of in metadata}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "packages": dict(sorted(found.items(), key=lambda item: item[0].lower())),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return str(os.getuid())
