"""The routed library on disk: a stock PEFT directory with gates and a router beside it.

``adapter_config.json`` and ``adapter_model.safetensors`` are what PEFT loads (the static merge),
``gates.safetensors`` and ``router.safetensors`` make it a routed one, ``routed.json`` says for
which base and embedding model, and holds the digests of the other files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tclora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter, write_adapter
from tclora.errors import LibraryError
from tclora.files import atomic_path, sha256_file, write_json
from tclora.library.identity import ModelIdentity
from tclora.library.layout import Layout, RoutedLayout
from tclora.library.manifest import check_listed, read_manifest
from tclora.library.places import heal
from tclora.route.gates import GatedAdapter, static_gate
from tclora.route.router import Router, load_router, save_router

# 1 stored gates as ratios to the static merge, 2 none for rows that belong to no cluster: both are
# still read. Since 3 every module's last gate is the fallback's.
_SCHEMA = 3
_READ = (1, 2, _SCHEMA)


class RoutedInfo(BaseModel):
    """What ``routed.json`` says.

    Attributes
    ----------
    base_model, embedding_model : ModelIdentity
        The models the library belongs to.
    template : str
        Prompt template; see `tclora.model.tokens.encode`.
    max_tokens : int
        Longest example in training (tokens).
    method : str
        The static merge, for stock PEFT; its components are those that are gated.
    clusters : tuple of str
        Adapter names of the clusters.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = _SCHEMA
    base_model: ModelIdentity
    embedding_model: ModelIdentity
    template: str
    max_tokens: int
    method: str
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class RoutedLibrary:
    """Shared factors, gates and router of a library, without any model.

    Attributes
    ----------
    folder : Path
        Where it is.
    gated : GatedAdapter
        Shared factors and gates.
    router : Router
        From prompt embeddings to weights.
    info : RoutedInfo
        What it belongs to.
    """

    folder: Path
    gated: GatedAdapter
    router: Router
    info: RoutedInfo

    def to_peft(
        self,
        target: str | Path,
        cluster: str | int | None = None,
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        share: float | None = None,
    ) -> Path:
        """Write one cluster's adapter, a mixture, or the static merge as a plain PEFT directory.

        Parameters
        ----------
        target : str or Path
            Directory to write.
        cluster : str or int, optional
            Adapter name or number of the cluster.
        weights : sequence of K float, or mapping from adapter name to float, optional
            Mixture of the clusters; names left out count 0.
        share : float, optional
            The static merge moved so far towards the fallback; see `GatedAdapter.blended`.

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        ValueError
            If not exactly one of cluster, weights and share is given, or a name is not known.
        """
        if [cluster, weights, share].count(None) != 2:
            raise ValueError("exactly one of cluster, weights and share must be given")
        target = Path(target)
        if cluster is not None:
            adapter = self.gated.cluster(cluster)
        elif share is not None:
            adapter = self.gated.blended(share).adapter
        else:
            adapter = self.gated.mixed(self._weights(weights or ()), target.name)
        write_adapter(adapter, target)
        return target

    def _weights(self, weights: Sequence[float] | Mapping[str, float]) -> Sequence[float]:
        if not isinstance(weights, Mapping):
            return weights
        names = self.gated.names
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(
                f"weights must name clusters of {', '.join(names)}, got {', '.join(unknown)}"
            )
        return [weights.get(name, 0.0) for name in names]


def write_library(folder: Path, gated: GatedAdapter, router: Router, info: RoutedInfo) -> None:
    """Write a routed library, atomically."""
    with atomic_path(folder) as fresh:
        files = RoutedLayout(fresh)
        write_adapter(gated.adapter, fresh)
        gates = {
            module: torch.cat([gate, gated.elsewhere(module).to(gate)[None]])
            for module, gate in gated.gates.items()
        }
        save_file(gates, files.gates, metadata={"names": json.dumps(gated.names)})
        save_router(router, files.router)
        digests = {file.name: sha256_file(file) for file in _contents(fresh)}
        current = {"schema_version": _SCHEMA, "digests": digests}  # whatever was read
        write_json(files.info, info.model_dump() | current)


def read_library(path: str | Path, *, router: str | None = None) -> RoutedLibrary:
    """Read a routed library, from its own folder or from the library directory that holds it.

    Parameters
    ----------
    path : str or Path
        The folder.
    router : str, optional
        Registered name of another router to make of the stored one's values.

    Raises
    ------
    LibraryError
        If a file is missing, corrupt, of another version or, in a library directory, of another
        run, which the message names; or if the router is not registered here, or cannot be made of
        the stored values.
    ValueError
        If no router has the name asked for.
    """
    folder, info = _open(Path(path))
    files = RoutedLayout(folder)
    with safe_open(files.gates, framework="pt") as file:
        names = tuple(json.loads((file.metadata() or {})["names"]))
    found = read_adapter(folder, info.method)
    adapter = Adapter(found.name, dict(found.modules), found.base_model)
    gates = load_file(files.gates)
    if info.schema_version == 1:
        gates = {m: (g * static_gate(adapter.modules[m])).float() for m, g in gates.items()}
    fallback = {}
    if info.schema_version >= 3:
        fallback = {m: g[len(names)] for m, g in gates.items()}
        gates = {m: g[: len(names)] for m, g in gates.items()}
    gated = GatedAdapter(adapter, gates, names, fallback)
    return RoutedLibrary(folder, gated, load_router(files.router, router), info)


def _contents(folder: Path) -> list[Path]:
    """Return the files that ``routed.json`` holds digests of."""
    files = RoutedLayout(folder)
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE, files.gates, files.router]


def _open(path: Path) -> tuple[Path, RoutedInfo]:
    """Find the routed folder and check its files, by its own record and by the library's."""
    heal(path)
    library = Layout(path)
    if RoutedLayout(path).info.exists() or not library.routed.folder.is_dir():
        return path, _read_info(path)
    folder = library.routed.folder
    info = _read_info(folder)
    if library.manifest.exists():  # else the library is unfinished
        check_listed(path, read_manifest(path), folder)
    return folder, info


def _read_info(folder: Path) -> RoutedInfo:
    """Read ``routed.json`` and check all files against it."""
    path = RoutedLayout(folder).info
    if not path.is_file():
        raise LibraryError(
            f"{folder} holds no routed library: it has no {path.name}; name a library directory "
            f"of a run with route.enabled, or its folder {Layout(folder).routed.folder.name}"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digests = values.pop("digests")
        info = RoutedInfo.model_validate(values)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise LibraryError(f"{path} cannot be read: {error}; run the pipeline again") from error
    if info.schema_version not in _READ:
        raise LibraryError(
            f"{path}: schema_version must be one of {', '.join(map(str, _READ))}, got "
            f"{info.schema_version}; run the pipeline again"
        )
    for file in _contents(folder):
        if not file.is_file():
            raise LibraryError(f"{file} is missing; run the pipeline again")
        if sha256_file(file) != digests.get(file.name):
            raise LibraryError(
                f"{file} is corrupt or was changed: its digest is not the one in {path.name}; "
                "run the pipeline again"
            )
    return info
