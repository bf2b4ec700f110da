"""What can be evaluated: a library with all its methods, an adapter, or a base model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tclora.adapter import CONFIG_FILE, locate_adapter, read_adapter
from tclora.errors import ConfigError, ModelError
from tclora.evaluate.places import Places
from tclora.evaluate.subjects import ALL, Adapted, Routed
from tclora.files import sha256_json, sha256_path
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, JOINT, ORACLE, OWN, ROUTED, cluster_number
from tclora.model.base import Base, LoadedBase
from tclora.model.locate import load_tokenizer, locate_base_model, model_digest
from tclora.registry import closest

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
    places: Places | None = None

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
