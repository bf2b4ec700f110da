"""What tasks hand to each other: small references to files on disk, checked by digest.

A stage's cache key is made of its configuration, the digests of its inputs and a digest of the
tclora source it runs. Prefect stores the returned `Artifact` as JSON; reading it back validates
that every file still exists with its digest, so a deleted or corrupt file counts as a miss.
"""

import ast
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.context import TaskRunContext
from pydantic import BaseModel, ConfigDict, model_validator

from tclora.files import sha256_json, sha256_path

_BY_VALUE = "tclora.config"  # counts by the values a stage is given, not by the text of its schema


class Artifact(BaseModel):
    """Files a stage has written, with their digests.

    Attributes
    ----------
    root : Path
        The library directory.
    files : dict
        Path below `root` (a file or a folder) → SHA-256.
    metrics : dict
        Figures to log.
    info : dict
        Whatever else later stages and the report need; JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    files: dict[str, str]
    metrics: dict[str, float] = {}
    info: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_files(self) -> "Artifact":
        for name, digest in self.files.items():
            path = self.root / name
            if not path.exists():
                raise ValueError(f"{path} does not exist any more")
            if sha256_path(path) != digest:
                raise ValueError(f"{path} has changed since it was written")
        return self

    @classmethod
    def of(
        cls,
        root: Path,
        *names: str,
        metrics: dict[str, float] | None = None,
        info: dict[str, Any] | None = None,
    ) -> "Artifact":
        """Make a reference to files just written below `root`."""
        files = {name: sha256_path(root / name) for name in names}
        return cls(root=root, files=files, metrics=metrics or {}, info=info or {})

    @property
    def path(self) -> Path:
        """The first file."""
        return self.root / next(iter(self.files))

    def alone(self) -> "Artifact":
        """Return a reference to the first file only, for stages that depend on nothing else."""
        name = next(iter(self.files))
        return Artifact.model_construct(root=self.root, files={name: self.files[name]})

    @property
    def digest(self) -> str:
        """Digest over all files."""
        return sha256_json(self.files)


def stage(
    *sources: str,
    **options: Any,  # noqa: ANN401
) -> Callable[[Callable[..., Artifact]], Task[..., Artifact]]:
    """Make a cached Prefect task of a stage.

    Parameters
    ----------
    *sources : str
        Modules of tclora the stage depends on, such as "tclora.train"; what they import from
        tclora counts too.
    **options
        Further options of ``prefect.task``.

    Notes
    -----
    The parameter ``run`` (where to log) is not part of the key.
    """

    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        inputs = {
            name: _identity(value) for name, value in sorted(parameters.items()) if name != "run"
        }
        return sha256_json([context.task.name, inputs, [source_digest(s) for s in sources]])

    return task(cache_key_fn=key, persist_result=True, result_serializer="json", **options)


def _identity(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Artifact):
        return [str(value.root), value.files]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    return str(value)


@cache
def source_digest(module: str) -> str:
    """Digest of a module's source and of every tclora module it imports, directly or not.

    The configuration's own module is left out: its values are inputs of the stage.
    """
    return sha256_json(
        [[name, sha256_path(path)] for name, path in sorted(_closure(module).items())]
    )


def _closure(module: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        by_value = name == _BY_VALUE or name.startswith(f"{_BY_VALUE}.")
        path = None if name in found or by_value else _source(name)
        if path:
            found[name] = path
            queue += _imports(path)
    return found


def _source(name: str) -> Path | None:
    """Return the file of a module; None for what a module defines, such as a function."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _imports(path: Path) -> Iterator[str]:
    """Yield what a source file imports from tclora, at any depth of nesting.

    A name imported from a package may be a module of its own, so both are candidates.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "tclora")
