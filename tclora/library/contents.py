"""What the report reads from a library directory, checked before anything is drawn.

``library.json``, ``clusters.parquet`` and ``explained_variance.parquet`` are mandatory. The
evaluation is optional, unless the manifest lists a digest for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tclora.errors import LibraryError
from tclora.library.manifest import MANIFEST, read_manifest

_MANIFEST_KEYS = (
    "name",
    "created",
    "config",
    "base_model",
    "embedding_model",
    "profile",
    "clustering",
    "training",
    "factors",
    "merges",
    "storage",
    "links",
    "versions",
    "digests",
)
_COLUMNS = {
    "clusters.parquet": "id prompt task split cluster similarity x y",
    "explained_variance.parquet": "module rank explained_variance",
    "evaluation/items.parquet": (
        "method split task cluster id prompt answer nll tokens correct generated"
    ),
    "evaluation/summary.parquet": (
        "method split group_kind group n nll nll_low nll_high accuracy accuracy_low accuracy_high"
    ),
    "evaluation/recovery.parquet": "method cluster recovery low high",
    "evaluation/harness.parquet": "method task metric value stderr",
    "routing.parquet": "id prompt task split nearest known similarity",
}


@dataclass(frozen=True)
class Contents:
    """A library's records, as frames.

    Attributes
    ----------
    manifest : Mapping
        ``library.json``.
    clusters : DataFrame
        One row per example: its cluster, split, task and place on the 2-D map.
    explained_variance : DataFrame
        Explained variance (fraction) per module and rank; "overall" for the whole.
    losses : Mapping[str, DataFrame]
        Adapter name → its training log; adapters without one are left out.
    items, summary, recovery, harness : DataFrame
        The evaluation; empty where it was not done.
    routing : DataFrame
        Where held-out prompts are routed, one column of weights per cluster's adapter; empty where
        there is no routed library.
    """

    manifest: Mapping[str, Any]
    clusters: pd.DataFrame
    explained_variance: pd.DataFrame
    losses: Mapping[str, pd.DataFrame]
    items: pd.DataFrame
    summary: pd.DataFrame
    recovery: pd.DataFrame
    harness: pd.DataFrame
    routing: pd.DataFrame

    @property
    def training_rows(self) -> pd.DataFrame:
        """The rows of `clusters` that adapters were trained on, dropped noise included."""
        return self.clusters[self.clusters["split"] == "train"]

    @property
    def primary(self) -> str:
        """The merge the run was for."""
        return str(self.manifest["config"]["merge"]["primary"])


def read_contents(library: Path) -> Contents:
    """Read what the report needs from a library directory.

    Parameters
    ----------
    library : Path
        The directory that holds ``library.json``.

    Returns
    -------
    Contents

    Raises
    ------
    LibraryError
        If a mandatory or listed file is missing, unreadable, of another schema or short of columns.
    """
    manifest = _read_manifest(library)
    return Contents(
        manifest=manifest,
        clusters=_read_table(library, "clusters.parquet"),
        explained_variance=_read_table(library, "explained_variance.parquet"),
        losses=_read_losses(library, manifest),
        items=_read_evaluation(library, "items", manifest),
        summary=_read_evaluation(library, "summary", manifest),
        recovery=_read_evaluation(library, "recovery", manifest),
        harness=_read_evaluation(library, "harness", manifest),
        routing=_read_routing(library, manifest),
    )


def _read_manifest(library: Path) -> dict[str, Any]:
    manifest = read_manifest(library)
    if missing := [key for key in _MANIFEST_KEYS if key not in manifest]:
        raise LibraryError(
            f"{library / MANIFEST} lacks {missing}; run the pipeline again to complete it"
        )
    return manifest


def _read_json(path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except ValueError as error:
        raise LibraryError(f"{path} is not valid JSON: {error}") from error


def _read_routing(library: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    name = "routing.parquet"
    if name not in manifest["digests"]:
        return pd.DataFrame(columns=_COLUMNS[name].split())
    columns = _COLUMNS[name].split() + [c for c in manifest["training"] if c != "joint"]
    return _read_table(library, name, columns)


def _read_table(library: Path, name: str, columns: list[str] | None = None) -> pd.DataFrame:
    path = library / name
    columns = columns or _COLUMNS[name].split()
    if not path.is_file():
        raise _missing(path)
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path} is not readable as Parquet: {error}") from error
    if missing := [column for column in columns if column not in frame]:
        raise LibraryError(f"{path} must have columns {columns}, lacks {missing}")
    return frame[columns]


def _read_evaluation(library: Path, stem: str, manifest: Mapping[str, Any]) -> pd.DataFrame:
    name = f"evaluation/{stem}.parquet"
    if not (library / name).is_file() and name not in manifest["digests"]:
        return pd.DataFrame(columns=_COLUMNS[name].split())
    return _read_table(library, name)


def _read_losses(library: Path, manifest: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    losses = {}
    for adapter in manifest["training"]:
        name = f"training/{adapter}.json"
        if (library / name).is_file() or name in manifest["digests"]:
            log = pd.DataFrame(_read_json(library / name))
            if not log.empty:
                losses[adapter] = log
    return losses


def _missing(path: Path) -> LibraryError:
    return LibraryError(
        f"{path} does not exist; run the pipeline to its end, or name the library's directory"
    )
