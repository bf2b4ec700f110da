"""A job on its way to a machine that shares no path with this one, and what comes back from it.

Whatever files are at the paths among a call's arguments travel with it, by their digests; whatever
differs at those paths when the job is done travels back. So a function sees on another machine what
it would see here, and need not know where it runs. Paths below a scratch folder stay with the
worker, for a job that goes on where another attempt was ended.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from tclora.jobs.call import Call, checked_arguments, import_path
from tclora.model.place import ModelPlace
from tclora.store.objects import Store
from tclora.store.trees import Digest, PlainName, Tree

_PATH = "$path"  # the only key of what stands for a path: the number of its slot


class Slot(BaseModel):
    """A path among the arguments of a job.

    Attributes
    ----------
    name : str
        Last part of the path.
    given : Tree or None
        What was there when the job was sent.
    scratch : bool
        Whether it stays with the worker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PlainName
    given: Tree | None = None
    scratch: bool = False


class Parcel(BaseModel):
    """A job as it travels.

    Attributes
    ----------
    function : str
        ``"package.module:function"``.
    arguments : dict
        JSON; paths are slots.
    slots : list of Slot
        The paths.
    models : dict of str to Tree
        Digest → files of a model that is a folder where the run started.
    source : str
        Digest of the source that the job executes; a worker with another one refuses it.
    beside : int
        Jobs that share the worker's host.
    gpus : int
        GPUs that it has there, if there are any.
    timeout : float or None
        Longest time it may take (s).
    lost_after : float or None
        Silence (s) after which its sender takes a worker for lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: str
    arguments: dict[str, Any]
    slots: list[Slot]
    models: dict[Digest, Tree] = {}
    source: str
    beside: int = 1
    gpus: int = 1
    timeout: float | None = None
    lost_after: float | None = None

    def unpacked(self, places: Mapping[int, Path]) -> Call:
        """Return the call with the paths of this machine."""
        arguments = _replace(self.arguments, lambda slot: str(places[slot]))
        return Call(function=self.function, arguments=arguments)


class Delivery(BaseModel):
    """What a job has made.

    Attributes
    ----------
    result : Any
        JSON; paths are slots.
    changed : dict of int to Tree
        Slot → what is there now and was not before.
    attempt : str
        Which attempt has made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: str
    result: Any
    changed: dict[int, Tree]

    def unpacked(self, places: Mapping[int, Path]) -> Any:  # noqa: ANN401
        """Return the result with the paths of this machine."""
        return _replace(self.result, lambda slot: str(places[slot]))


class Packed(BaseModel):
    """A call whose paths are slots, and which path each slot is here."""

    function: str
    arguments: dict[str, Any]
    paths: list[Path]
    models: dict[str, str]

    @classmethod
    def of(cls, function: Callable[..., object], arguments: Mapping[str, object]) -> "Packed":
        """Take the paths out of a call; see `tclora.jobs.call.Call.of` for what is raised."""
        checked = checked_arguments(function, arguments)
        paths: dict[Path, int] = {}
        models: dict[str, str] = {}
        packed = _packed(checked, paths, models)
        return cls(
            function=import_path(function), arguments=packed, paths=list(paths), models=models
        )

    @property
    def places(self) -> dict[int, Path]:
        """Slot → path here."""
        return dict(enumerate(self.paths))

    def sent(
        self,
        store: Store,
        scratch: Path,
        *,
        source: str,
        beside: int,
        timeout: float | None,
        gpus: int = 1,
        lost_after: float | None = None,
        models: bool = True,
    ) -> Parcel:
        """Store the files that are at the paths, and return what a worker needs to know.

        `models` says whether folders of models travel too; see `Parcel` for the rest.
        """
        slots = []
        for path in self.paths:
            stays = path.absolute().is_relative_to(scratch.absolute())
            given = None if stays else store.push(path)
            slots.append(Slot(name=path.name, given=given, scratch=stays))
        folders = self.models.items() if models else ()
        stored = {digest: store.push(Path(place)) for digest, place in folders}
        return Parcel(
            function=self.function,
            arguments=self.arguments,
            slots=slots,
            models={digest: tree for digest, tree in stored.items() if tree},
            source=source,
            beside=beside,
            gpus=gpus,
            timeout=timeout,
            lost_after=lost_after,
        )


def packed_result(result: Any, places: Mapping[int, Path]) -> Any:  # noqa: ANN401
    """Return a result whose paths, as text, are slots."""
    slots = {str(path): slot for slot, path in places.items()}
    if isinstance(result, str):
        return {_PATH: slots[result]} if result in slots else result
    if isinstance(result, Mapping):
        return {key: packed_result(item, places) for key, item in result.items()}
    if isinstance(result, list):
        return [packed_result(item, places) for item in result]
    return result


def _packed(value: Any, paths: dict[Path, int], models: dict[str, str]) -> Any:  # noqa: ANN401
    """Return a value as JSON with slots for paths; note paths, and models that are folders."""
    if isinstance(value, Path):
        return {_PATH: paths.setdefault(value, len(paths))}
    if isinstance(value, ModelPlace) and Path(value.here).is_dir():
        models[value.digest] = value.here
    if isinstance(value, BaseModel):
        named = {name: getattr(value, name) for name in sorted(value.model_fields_set)}
        return {name: _packed(item, paths, models) for name, item in named.items()}
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _packed(item, paths, models) for name, item in named.items()}
    if isinstance(value, Mapping):
        return {str(key): _packed(item, paths, models) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(item, paths, models) for item in value]
    return to_jsonable_python(value)


def _replace(value: Any, path_of: Callable[[int], str]) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        if value.keys() == {_PATH}:
            return path_of(value[_PATH])
        return {key: _replace(item, path_of) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, path_of) for item in value]
    return value
