"""Messages between sandboxes: length-prefixed JSON, in it the values of the usual types of Python.

JSON's own values stand for themselves, but for arrays: each is ``[tag, ...]``. A value of any other
type stays where it is; what travels is a number for it. Nothing that arrives is ever executed.
"""

import json
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

_LARGEST = 1 << 24  # of a message (bytes)
_LONG = 1 << 62  # beyond it a number is written in hexadecimal, which costs no quadratic time

_ITEMS: tuple[tuple[str, type[Any], Callable[[list[Any]], object]], ...] = (
    ("list", list, list),
    ("tuple", tuple, tuple),
    ("set", set, set),
    ("frozenset", frozenset, frozenset),
    ("deque", deque, deque),
    ("keys", type({}.keys()), lambda items: dict.fromkeys(items).keys()),
)
_PAIRS: tuple[tuple[str, type[Any], Callable[[list[Any]], object]], ...] = (
    ("Counter", Counter, lambda pairs: Counter(dict(pairs))),
    ("OrderedDict", OrderedDict, OrderedDict),
    ("dict", dict, dict),
)
_TEXTS: tuple[tuple[str, type[Any], Callable[[Any], str], Callable[[str], object]], ...] = (
    ("int", int, hex, lambda text: int(text, 16)),
    ("bytes", bytes, bytes.hex, bytes.fromhex),
    ("bytearray", bytearray, bytearray.hex, bytearray.fromhex),
    ("complex", complex, repr, complex),
    ("Decimal", Decimal, str, Decimal),
    ("Fraction", Fraction, str, Fraction),
    ("datetime", datetime, datetime.isoformat, datetime.fromisoformat),
    ("date", date, date.isoformat, date.fromisoformat),
)
_READERS = {tag: read for tag, _, read in (*_ITEMS, *_PAIRS)}
_PARSERS = {tag: parse for tag, _, _, parse in _TEXTS}


def encode(value: Any, refer: Callable[[object], list[Any]]) -> Any:  # noqa: ANN401
    """Return a value as JSON; instances of subclasses become instances of the usual type.

    Parameters
    ----------
    value : object
        Any value.
    refer : callable
        Returns what stands for an object that does not travel.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < _LONG:
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    for tag, kind, write, _ in _TEXTS:
        if isinstance(value, kind):
            return [tag, write(value)]
    for tag, kind, _ in _ITEMS:
        if isinstance(value, kind):
            return [tag, [encode(item, refer) for item in value]]
    for tag, kind, _ in _PAIRS:
        if isinstance(value, kind):
            return [tag, [[encode(k, refer), encode(v, refer)] for k, v in value.items()]]
    return refer(value)


def decode(value: Any, resolve: Callable[[list[Any]], object]) -> Any:  # noqa: ANN401
    """Return the value that JSON stands for; `resolve` is the inverse of `refer`."""
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag == "range":
        return range(*rest)
    if tag in _PARSERS:
        return _PARSERS[tag](rest[0])
    if tag not in _READERS:
        return resolve(value)
    if tag in {"Counter", "OrderedDict", "dict"}:
        return _READERS[tag]([(decode(k, resolve), decode(v, resolve)) for k, v in rest[0]])
    return _READERS[tag]([decode(item, resolve) for item in rest[0]])


def send(descriptor: int, message: object) -> None:
    """Write a message."""
    data = json.dumps(message).encode("ascii")
    data = len(data).to_bytes(4) + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:  # noqa: ANN401
    """Read a message.

    Raises
    ------
    EOFError
        If the other side has gone.
    ValueError
        If it is too long or no JSON.
    """
    size = int.from_bytes(_exactly(descriptor, 4))
    if size > _LARGEST:
        raise ValueError(f"a message must be at most {_LARGEST} bytes, got {size}")
    return json.loads(_exactly(descriptor, size))


def _exactly(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            raise EOFError("the other side has gone")
        data += chunk
    return data
