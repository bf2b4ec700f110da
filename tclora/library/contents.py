"""What the report reads from a library directory, checked before anything is drawn.

Only what the manifest lists is read, and only if it is what the manifest says. Clusters and
explained variance are mandatory; evaluation, training logs and routing may be missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tclora.errors import LibraryError
from tclora.library.layout import EvaluationLayout, Layout
from tclora.library.manifest import check_listed, is_listed, read_manifest
from tclora.library.names import cluster_number
from tclora.library.records import Manifest

_CLUSTERS = ["id", "prompt", "task", "split", "cluster", "similarity", "x", "y"]
_EXPLAINED = ["module", "rank", "explained_variance"]
_ROUTING = ["id", "prompt", "task", "split", "nearest", "known", "similarity"]
_EVALUATION = {
    "items": [
        "method", "split", "task", "cluster", "id", "prompt", "answer", "nll", "tokens", "correct",
        "generated",
    ],
    "summary": [
        "method", "split", "group_kind", "group", "n", "nll", "nll_low", "nll_high", "accuracy",
        "accuracy_low", "accuracy_high",
    ],
    "recovery": ["method", "cluster", "recovery", "low", "high"],
    "winners": ["metric", "split", "group_kind", "group", "method", "best", "p", "tie"],
    "cross": ["cluster", "adapter", "n", "nll"],
    "harm": ["measure", "clusters", "n", "rho", "low", "high", "p"],
    "lm_eval": ["method", "task", "metric", "value", "stderr"],
}  # fmt: skip
_NEWER = {  # columns that tables of version 0.1.0 lack, or that not all have
    "items": ["seed"],
    "summary": ["seeds", "accuracy_norm", "accuracy_norm_low", "accuracy_norm_high"],
    "recovery": ["n", "seeds"],
    "cross": ["added", "low", "high", "change", "change_low", "change_high"],
}
_MODULES = ["module", "first", "second", "sign_conflict", "weight"]
_INTERFERENCE = ["first", "second", "cosine", "input_overlap", "output_overlap", "sign_conflict"]
_ANGLES = ["input_angle", "output_angle", "input_nearest", "output_nearest"]
_SHARED = ["module", "rank", "energy", "shared", "spread", "core_consistency"]


@dataclass(frozen=True)
class Contents:
    """A library's records, as frames.

    Attributes
    ----------
    manifest : Manifest
        What the library says of itself.
    clusters : DataFrame
        One row per example: its cluster, split, task and place on the 2-D map.
    explained_variance : DataFrame
        Explained variance (fraction) per module and rank; "overall" for the whole.
    losses : Mapping[str, DataFrame]
        Adapter name → its training log; adapters without one are left out.
    items, summary, recovery, winners, cross, harm, lm_eval : DataFrame
        The evaluation; empty where it was not done.
    interference, module_interference, shared_structure : DataFrame
        What adapters do to each other and what their factors share; empty in earlier libraries.
    routing : DataFrame
        Where held-out prompts are routed, one column of weights per cluster's adapter; empty where
        there is no routed library.
    """

    manifest: Manifest
    clusters: pd.DataFrame
    explained_variance: pd.DataFrame
    losses: Mapping[str, pd.DataFrame]
    items: pd.DataFrame
    summary: pd.DataFrame
    recovery: pd.DataFrame
    winners: pd.DataFrame
    cross: pd.DataFrame
    harm: pd.DataFrame
    lm_eval: pd.DataFrame
    interference: pd.DataFrame
    module_interference: pd.DataFrame
    shared_structure: pd.DataFrame
    routing: pd.DataFrame

    @property
    def training_rows(self) -> pd.DataFrame:
        """The rows of `clusters` that adapters were trained on, dropped noise included."""
        return self.clusters[self.clusters["split"] == "train"]

    @property
    def primary(self) -> str:
        """The merge the run was for."""
        return self.manifest.settings.merge.primary


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
        If a mandatory or listed file is missing, unreadable, short of columns or not the one that
        the manifest lists, or if the manifest is of another schema.
    """
    manifest = read_manifest(library)
    reader = _Reader(library.absolute(), manifest)
    layout = Layout(library)
    return Contents(
        manifest=manifest,
        clusters=reader.table(layout.clusters, _CLUSTERS),
        explained_variance=reader.table(layout.explained_variance, _EXPLAINED),
        losses=_read_losses(reader, layout),
        **_read_evaluation(reader, layout.evaluation),
        interference=reader.optional(layout.interference, _INTERFERENCE, _ANGLES),
        module_interference=reader.optional(layout.module_interference, _MODULES),
        shared_structure=reader.optional(layout.shared_structure, _SHARED),
        routing=_read_routing(reader, layout.routing),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads files of a library that are what its manifest says."""

    root: Path
    manifest: Manifest

    def table(self, path: Path, columns: list[str], newer: Sequence[str] = ()) -> pd.DataFrame:
        """Read a table that must be there; newer columns are empty where it has none."""
        check_listed(self.root, self.manifest, path)
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise LibraryError(
                f"{path} is not readable as Parquet: {error}; run the pipeline again"
            ) from error
        if missing := [column for column in columns if column not in frame]:
            raise LibraryError(
                f"{path} must have columns {columns}, lacks {missing}; run the pipeline again"
            )
        return frame.reindex(columns=[*columns, *newer])

    def optional(self, path: Path, columns: list[str], newer: Sequence[str] = ()) -> pd.DataFrame:
        """Read a table, empty if the library has none."""
        if not is_listed(self.root, self.manifest, path):
            return pd.DataFrame(columns=[*columns, *newer])
        return self.table(path, columns, newer)

    def records(self, path: Path) -> Any:  # noqa: ANN401
        """Read JSON, an empty list if the library has none."""
        if not is_listed(self.root, self.manifest, path):
            return []
        check_listed(self.root, self.manifest, path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LibraryError(
                f"{path} must be JSON, but {error}; run the pipeline again"
            ) from error


def _read_losses(reader: _Reader, layout: Layout) -> dict[str, pd.DataFrame]:
    logs = {
        name: pd.DataFrame(reader.records(layout.training(name)))
        for name in reader.manifest.training
    }
    return {name: log for name, log in logs.items() if not log.empty}


def _read_evaluation(reader: _Reader, tables: EvaluationLayout) -> dict[str, pd.DataFrame]:
    places = {kind: tables.table(kind) for kind in _EVALUATION}
    if is_listed(reader.root, reader.manifest, tables.former_lm_eval):
        places["lm_eval"] = tables.former_lm_eval
    read = {
        kind: reader.optional(place, _EVALUATION[kind], _NEWER.get(kind, ()))
        for kind, place in places.items()
    }
    # Version 0.1.0 gave the worst cluster an interval that did not hold.
    recovered = read["recovery"]
    recovered.loc[recovered["cluster"] == "worst", ["low", "high"]] = float("nan")
    return read


def _read_routing(reader: _Reader, file: Path) -> pd.DataFrame:
    """Read the routing of the held-out prompts; version 0.1.0 knew known or not alone."""
    names = _cluster_names(reader.manifest)
    table = reader.optional(file, _ROUTING + names, ["belonging"])
    known = table["known"].astype(float)
    return table.assign(belonging=table["belonging"].astype(float).fillna(known))


def _cluster_names(manifest: Manifest) -> list[str]:
    return [name for name in manifest.training if cluster_number(name) is not None]
