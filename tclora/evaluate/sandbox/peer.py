"""Calls between two processes that do not trust each other.

Each side holds the objects that did not travel and hands out numbers for them; the other side has a
`Remote` in place of each. The side of the tests serves little: the program may call the functions
that it was given, and nothing else, nor can it name anything of the standard library to it. While
one side waits for a result it serves the other's calls, so that a function may be an argument.
"""

import builtins
import importlib
import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from tclora.evaluate.sandbox.values import decode, encode, receive, send

OPERATIONS: Mapping[str, Callable[..., object]] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "same": operator.eq,
    "bool": bool,
    "len": len,
    "text": str,
    "iter": iter,
    "next": next,
    "origin": lambda target: library_name(target),
}
CALLBACKS = ("call", "iter", "next")
ROOT = 0  # number of the first object that a side holds
_MUTABLE = (list, dict, set, bytearray, deque)


class GoneError(BaseException):
    """The other side has ended; no ``except Exception`` of a test takes it for an answer."""


class Peer:
    """One end of a connection.

    Parameters
    ----------
    descriptor : int
        A connected socket.
    permitted : collection of str
        The operations on its own objects that this side serves.
    root : object
        What the other side finds as its object number `ROOT`.
    trusted : bool
        Whether this side may name what both sides have of the standard library; the other may not.
    """

    def __init__(
        self, descriptor: int, permitted: Collection[str], *, root: object, trusted: bool
    ) -> None:
        self._descriptor = descriptor
        self._permitted = permitted
        self._trusted = trusted
        self._held: dict[int, object] = {ROOT: root}
        self._numbers: dict[int, int] = {}

    def ask(self, operation: str, target: object, *arguments: object, **keywords: object) -> Any:  # noqa: ANN401
        """Have the other side do something with one of its objects; return or raise the result.

        Lists, dictionaries and sets among the arguments are changed as the other side changed them.
        """
        given = [target, *arguments]
        self._send({"do": operation, "with": self._out(given), "keywords": self._out(keywords)})
        while "do" in (answer := self._receive()):
            self._serve(answer)
        for place, value in answer.get("changed", {}).items():
            _replace(given[int(place)], self._in(value))
        if "raises" in answer:
            raise _exception(answer["raises"], str(answer.get("text", "")))
        return self._in(answer["gives"])

    def serve(self) -> None:
        """Serve the other side until it goes."""
        while True:
            self._serve(self._receive())

    def _serve(self, request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {}
        try:
            if request["do"] not in self._permitted:
                raise PermissionError(f"{request['do']} is not permitted here")
            given = self._in(request["with"])
            keywords = self._in(request["keywords"])
            try:
                result = OPERATIONS[request["do"]](*given, **keywords)
                answer["gives"] = self._out(result)
            finally:
                answer["changed"] = self._changes(given, request["with"][1])
        except BaseException as error:  # an exception is an answer
            names = [kind.__name__ for kind in type(error).__mro__]
            answer |= {"raises": names, "text": str(error)[:1000]}
        self._send(answer)

    def _changes(self, given: list[Any], before: list[Any]) -> dict[int, Any]:
        """Return the arguments that are not any more what was sent."""
        pairs = enumerate(zip(given, before, strict=True))
        now = {i: (self._out(v), old) for i, (v, old) in pairs if isinstance(v, _MUTABLE)}
        return {i: new for i, (new, old) in now.items() if new != old}

    def _send(self, message: dict[str, Any]) -> None:
        try:
            send(self._descriptor, message)
        except OSError as error:
            raise GoneError from error

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = receive(self._descriptor)
        except (EOFError, OSError, ValueError) as error:  # after nonsense nothing makes sense
            raise GoneError from error
        return message

    def _out(self, value: object) -> Any:  # noqa: ANN401
        return encode(value, self._refer)

    def _in(self, value: object) -> Any:  # noqa: ANN401
        return decode(value, self._resolve)

    def _refer(self, value: object) -> list[Any]:
        """Stand in for an object: the other side's own, one that both sides have, or a number."""
        if isinstance(value, Remote):
            return ["yours", number_of(value)]
        if self._trusted and (name := library_name(value)):
            return ["library", *name]
        number = self._numbers.setdefault(id(value), len(self._held))
        self._held[number] = value  # held, so that its id stays its own
        return ["object", number]

    def _resolve(self, reference: list[Any]) -> object:
        match reference:
            case ["yours", int(number)]:
                return self._held[number]
            case ["library", str(module), str(name)] if not self._trusted:
                return from_library(module, name)
            case ["object", int(number)]:
                return Remote(self, number)
        raise ValueError(f"a value must be a known one, got {reference!r}")


class Remote:
    """An object of the other side: can be called, looked into, walked through.

    It equals no value of this side, whatever it says itself, and takes no part in arithmetic: an
    object that decides such things could agree with every test.
    """

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_reference", (peer, number))

    def __call__(self, *arguments: object, **keywords: object) -> Any:  # noqa: ANN401, D102
        return _peer(self).ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return _peer(self).ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        _peer(self).ask("set", self, name, value)

    def __getitem__(self, key: object) -> Any:  # noqa: ANN401
        return _peer(self).ask("item", self, key)

    def __setitem__(self, key: object, value: object) -> None:
        _peer(self).ask("put", self, key, value)

    def __len__(self) -> int:
        return int(_peer(self).ask("len", self))

    def __bool__(self) -> bool:
        return bool(_peer(self).ask("bool", self))

    def __str__(self) -> str:
        return str(_peer(self).ask("text", self))

    def __iter__(self) -> Iterator[Any]:
        return iter(_Walk(_peer(self), _peer(self).ask("iter", self)))

    def __next__(self) -> Any:  # noqa: ANN401
        return _peer(self).ask("next", self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(_peer(self).ask("same", self, other))

    def __hash__(self) -> int:
        return number_of(self)


class _Walk:
    """Iterates over an iterator of the other side."""

    def __init__(self, peer: Peer, walked: object) -> None:
        self._peer = peer
        self._walked = walked

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:  # noqa: ANN401
        return self._peer.ask("next", self._walked)


def number_of(remote: Remote) -> int:
    """Return the number that the other side gave an object."""
    number: int = object.__getattribute__(remote, "_reference")[1]
    return number


def _peer(remote: Remote) -> Peer:
    peer: Peer = object.__getattribute__(remote, "_reference")[0]
    return peer


def library_name(value: object) -> tuple[str, str] | None:
    """Return module and name of what the standard library has on both sides."""
    if isinstance(value, ModuleType):
        return (value.__name__, "") if _in_library(value.__name__) else None
    if not isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return None
    module, name = value.__module__, value.__name__
    if not isinstance(module, str) or not _in_library(module):
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None


def _in_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"


def from_library(module: str, name: str) -> object:
    """Return what `library_name` has named."""
    if not _in_library(module):
        raise ValueError(f"a module must be of the standard library, got {module!r}")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def _exception(names: list[str], text: str) -> Exception:
    """Return the nearest exception of Python's own."""
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # takes other arguments
                continue
    return RuntimeError(text)


def _replace(target: Any, new: Any) -> None:  # noqa: ANN401
    """Give a container the contents of another of its type."""
    if not isinstance(target, _MUTABLE) or not isinstance(new, type(target)):
        return
    target.clear()
    getattr(target, "update" if isinstance(target, (dict, set)) else "extend")(new)
