"""What can be evaluated: a library with all its methods, an adapter, or a base model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from tclora.adapter import CONFIG_FILE, locate_adapter, read_adapter
from tclora.cluster.centroids import assign
from tclora.cluster.embed import embed_texts
from tclora.cluster.vectors import Embeddings
from tclora.errors import ConfigError, ModelError
from tclora.evaluate.subjects import ALL, Adapted, Routed
from tclora.files import sha256_json, sha256_path
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, JOINT, ORACLE, OWN, ROUTED, cluster_name, cluster_number
from tclora.library.records import Manifest
from tclora.model.base import Base, LoadedBase
from tclora.model.locate import load_tokenizer, locate_base_model, locate_embedder, model_digest
from tclora.registry import closest
from tclora.route import read_library
from tclora.route.quality import true_clusters
from tclora.route.routing import Routing

BY_CLUSTER = frozenset({OWN, ROUTED, ORACLE})  # methods that look at where a prompt belongs


@dataclass(frozen=True)
class Method:
    """One way to answer.

    Attributes
    ----------
    name : str
        What tables call it.
    digest : str
        Of everything its answers depend on beside the base model.
    open : callable
        Puts it on a base model.
    """

    name: str
    digest: str
    open: Callable[[LoadedBase], Adapted | Routed]


@dataclass(frozen=True)
class Target:
    """What is evaluated.

    Attributes
    ----------
    name : str
        Of the library, adapter or model.
    base : Base
        The base model.
    methods : mapping
        Name → method, in the order of tables.
    places : Places or None
        Where a library's prompts belong; None for an adapter or a base model.
    """

    name: str
    base: Base
    methods: Mapping[str, Method]
    places: "Places | None" = None

    def with_adapters(self, adapters: Mapping[str, str]) -> "Target":
        """Return the target with more methods: name → PEFT directory or hub id of an adapter.

        Raises
        ------
        ConfigError
            If a name is one of its methods already.
        AdapterError
            If one cannot be read.
        """
        methods = dict(self.methods)
        for name, spec in adapters.items():
            if name in methods:
                raise ConfigError(f"--adapter must have a name of its own, got {name!r}; rename it")
            folder = locate_adapter(spec)
            read_adapter(folder)
            methods[name] = _adapted(name, {ALL: folder}, sha256_path(folder))
        return replace(self, methods=methods)

    def choose(self, names: Sequence[str]) -> list[Method]:
        """Return methods by name, all where none is named.

        Raises
        ------
        ConfigError
            If there is no such method.
        """
        for name in names:
            if name not in self.methods:
                raise ConfigError(
                    f"--methods must be of {self.name!r}, got {name!r}; "
                    f"{closest(name, self.methods)}"
                )
        return [self.methods[name] for name in names or self.methods]


class Places:
    """Where prompts belong in a library: their splits, nearest and true clusters, routes.

    Parameters
    ----------
    layout : Layout
        Of the library.
    manifest : Manifest
        What it says of itself.
    cache : Path
        Folder of embeddings.
    """

    def __init__(self, layout: Layout, manifest: Manifest, cache: Path) -> None:
        self._layout = layout
        self._embedder = manifest.embedding_model
        self._cache = cache

    @cached_property
    def true(self) -> pd.Series:
        """Task the adapters were trained on → the cluster of most of its rows."""
        rows = pd.read_parquet(self._layout.clusters, columns=["task", "split", "cluster"])
        known = rows.assign(true=true_clusters(rows)).dropna(subset=["true"])
        return known.groupby("task")["true"].first().astype(int)

    def label(self, rows: pd.DataFrame, *, clusters: bool) -> pd.DataFrame:
        """Return rows with their splits and, where asked for, nearest clusters.

        Rows of a task that was trained on are in-domain ("test") and others out of domain ("ood"),
        except those of split "composition"; without task labels in the library, rows keep theirs.
        """
        kept = rows["split"] == "composition"
        trained = rows["task"].isin(self.true.index).map({True: "test", False: "ood"})
        named = rows["split"].fillna("test") if self.true.empty else trained
        split = rows["split"].where(kept, named)
        return rows.assign(split=split, cluster=self.nearest(rows) if clusters else None)

    def nearest(self, rows: pd.DataFrame) -> pd.Series:
        """Return the clusters whose centroids are nearest to the prompts."""
        centres = load_file(self._layout.centroids)["centroids"]
        return pd.Series(assign(self._embed(rows), centres)[0], index=rows.index)

    def routed(self, rows: pd.DataFrame) -> Routing:
        """Route prompts as the library does."""
        return read_library(self._layout.routed.folder).router.route(self._embed(rows))

    def oracle(self, rows: pd.DataFrame) -> Routing:
        """Route each row to its task's cluster; of a task that was not trained on, to the nearest.

        No prompt gets the static merge.
        """
        own = rows["task"].map(self.true) if "task" in rows else pd.Series(np.nan, rows.index)
        numbers = own.fillna(self.nearest(rows)).astype(int).tolist()
        names = read_library(self._layout.routed.folder).gated.names
        weights = np.zeros((len(rows), len(names)), np.float32)
        places = [names.index(cluster_name(number)) for number in numbers]
        weights[np.arange(len(rows)), places] = 1
        return Routing(weights, np.ones(len(rows), bool), np.ones(len(rows), np.float32))

    def _embed(self, rows: pd.DataFrame) -> Embeddings:
        location = locate_embedder(self._embedder.id)
        if model_digest(location) != self._embedder.digest:
            raise ModelError(
                f"the embedding model must be the library's own, {self._embedder.id!r} (digest "
                f"{self._embedder.digest[:12]}), but another one is there under its name"
            )
        return embed_texts(
            rows["prompt"].tolist(),
            location,
            cache=self._cache,
            model_digest=self._embedder.digest,
        )


@dataclass(frozen=True)
class BaseChoice:
    """What a user says of the base model; what is None is as the target or the model says.

    Attributes
    ----------
    base : str or None
        Its name or place.
    template : {"chat", "plain"} or None
        How prompts are written; without a library, the tokenizer's chat template where it has one.
    dtype : {"auto", "bfloat16", "float16", "float32"} or None
        Type of its weights.
    """

    base: str | None = None
    template: str | None = None
    dtype: str | None = None


_AS_SAID = BaseChoice()


def open_target(spec: str, cache: Path, choice: BaseChoice = _AS_SAID) -> Target:
    """Open what is to be evaluated.

    Parameters
    ----------
    spec : str
        A library directory, a PEFT directory or hub id of an adapter, or a base model.
    cache : Path
        Folder of embeddings.
    choice : BaseChoice
        What is not to be as the library, the adapter or the model says.

    Returns
    -------
    Target

    Raises
    ------
    LibraryError, AdapterError, ModelError
        If something cannot be found, or is not what the library was made with.
    """
    layout = Layout(Path(spec))
    if layout.manifest.exists():
        return _library(layout, cache, choice)
    if (Path(spec) / CONFIG_FILE).exists() or (not Path(spec).is_dir() and choice.base):
        return _adapter(spec, choice)
    name = Path(spec).name
    return Target(name, _base(choice.base or spec, choice), {BASE: _adapted(BASE, {}, "")})


def _library(layout: Layout, cache: Path, choice: BaseChoice) -> Target:
    manifest = read_manifest(layout.root)
    own = {
        str(number): layout.adapter(name)
        for name in manifest.training
        if (number := cluster_number(name)) is not None and layout.adapter(name).is_dir()
    }
    joint = layout.adapter(JOINT)
    settings = manifest.settings.train
    wanted = manifest.base_model
    said = BaseChoice(None, choice.template or settings.template, choice.dtype or settings.dtype)
    found = _base(choice.base or wanted.location, said, settings.max_tokens)
    if found.digest != wanted.digest:
        raise ModelError(
            f"the base model must be the library's own, {wanted.id!r} (digest "
            f"{wanted.digest[:12]}), got {found.location!r} (digest {found.digest[:12]}); "
            "name it by --base"
        )
    places = Places(layout, manifest, cache)

    def digest(path: Path) -> str:
        name = layout.name(path)
        listed = [(known, d) for known, d in sorted(manifest.digests.items())
                  if known == name or known.startswith(f"{name}/")]  # fmt: skip
        return sha256_json(listed)

    where = [digest(layout.centroids), manifest.embedding_model.digest]
    methods = [_adapted(BASE, {}, "")]
    if own:
        methods.append(_adapted(OWN, own, sha256_json([*map(digest, own.values()), *where])))
    if joint.is_dir():
        methods.append(_adapted(JOINT, {ALL: joint}, digest(joint)))
    for name in sorted(manifest.merges, key=lambda m: (m != manifest.settings.merge.primary, m)):
        methods.append(_adapted(name, {ALL: layout.merged(name)}, digest(layout.merged(name))))
    if layout.routed.info.exists():
        folder = layout.routed.folder
        for name, route in ((ROUTED, places.routed), (ORACLE, places.oracle)):
            key = sha256_json([name, digest(folder), digest(layout.clusters), *where])
            methods.append(Method(name, key, partial(Routed, folder=folder, route=route)))
    return Target(manifest.name, found, {m.name: m for m in methods}, places)


def _adapter(spec: str, choice: BaseChoice) -> Target:
    folder = locate_adapter(spec)
    adapter = read_adapter(folder)
    named = choice.base or adapter.base_model
    if named is None:
        raise ModelError(f"adapter {spec!r} does not name its base model; name it by --base")
    name = folder.name if Path(spec).exists() else Path(spec).name
    methods = [_adapted(BASE, {}, ""), _adapted(name, {ALL: folder}, sha256_path(folder))]
    return Target(name, _base(named, choice), {m.name: m for m in methods})


def _base(spec: str, choice: BaseChoice, max_tokens: int = 1024) -> Base:
    location = locate_base_model(spec)
    chosen: Any = choice.template
    if chosen is None:
        chosen = "plain" if load_tokenizer(location).chat_template is None else "chat"
    return Base(
        location=location,
        digest=model_digest(location),
        dtype=choice.dtype or "auto",
        template=chosen,
        max_tokens=max_tokens,
    )


def _adapted(name: str, adapters: Mapping[str, Path], digest: str) -> Method:
    return Method(name, digest, partial(Adapted, adapters=dict(adapters)))
