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

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tclora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter, write_adapter
from tclora.errors import LibraryError
from tclora.files import atomic_path, sha256_file, write_json
from tclora.route.gates import GatedAdapter
from tclora.route.router import Router, load_router, save_router

FOLDER = "routed"  # below a library directory
INFO_FILE = "routed.json"
GATES_FILE = "gates.safetensors"
ROUTER_FILE = "router.safetensors"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, GATES_FILE, ROUTER_FILE)


class ModelIdentity(BaseModel):
    """Which model something was made with.

    Attributes
    ----------
    id : str
        As configured: a built-in name, a folder or a hub id.
    digest : str
        Of its files, or of hub id and commit; see `tclora.model.locate.model_digest`.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    digest: str


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
        The static merge, for prompts far from every cluster and for stock PEFT.
    clusters : tuple of str
        Adapter names of the clusters.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
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
    ) -> Path:
        """Write one cluster's adapter, or a mixture, as a plain PEFT directory.

        Parameters
        ----------
        target : str or Path
            Directory to write.
        cluster : str or int, optional
            Adapter name or number of the cluster.
        weights : sequence of K float, or mapping from adapter name to float, optional
            Mixture of the clusters; names left out count 0.

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        ValueError
            If not exactly one of cluster and weights is given, or a name is not known.
        """
        if (cluster is None) == (weights is None):
            raise ValueError("exactly one of cluster and weights must be given")
        target = Path(target)
        if cluster is not None:
            adapter = self.gated.cluster(cluster)
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
        write_adapter(gated.adapter, fresh)
        gates = {name: gate.contiguous() for name, gate in gated.gates.items()}
        save_file(gates, fresh / GATES_FILE, metadata={"names": json.dumps(gated.names)})
        save_router(router, fresh / ROUTER_FILE)
        digests = {name: sha256_file(fresh / name) for name in _FILES}
        write_json(fresh / INFO_FILE, info.model_dump() | {"digests": digests})


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
        If a file is missing, corrupt or of another version, which the message names; or if the
        router is not registered here, or cannot be made of the stored values.
    ValueError
        If no router has the name asked for.
    """
    folder = Path(path)
    if not (folder / INFO_FILE).exists() and (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    info = _read_info(folder)
    with safe_open(folder / GATES_FILE, framework="pt") as file:
        names = tuple(json.loads((file.metadata() or {})["names"]))
    found = read_adapter(folder, info.method)
    adapter = Adapter(found.name, dict(found.modules), found.base_model)
    gated = GatedAdapter(adapter, load_file(folder / GATES_FILE), names)
    return RoutedLibrary(folder, gated, load_router(folder / ROUTER_FILE, router), info)


def _read_info(folder: Path) -> RoutedInfo:
    """Read ``routed.json`` and check all files against it."""
    path = folder / INFO_FILE
    if not path.is_file():
        raise LibraryError(
            f"{folder} holds no routed library: it has no {INFO_FILE}; name a library directory "
            "of a run with route.enabled, or its folder routed/"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digests = values.pop("digests")
        info = RoutedInfo.model_validate(values)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise LibraryError(f"{path} cannot be read: {error}; run the pipeline again") from error
    if info.schema_version != 1:
        raise LibraryError(
            f"{path}: schema_version must be 1, got {info.schema_version}; run the pipeline again"
        )
    for name in _FILES:
        if not (folder / name).is_file():
            raise LibraryError(f"{folder / name} is missing; run the pipeline again")
        if sha256_file(folder / name) != digests.get(name):
            raise LibraryError(
                f"{folder / name} is corrupt or was changed: its digest is not the one in "
                f"{INFO_FILE}; run the pipeline again"
            )
    return info
