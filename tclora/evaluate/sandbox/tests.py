"""What runs in the tests' sandbox: unit tests on functions that are in another sandbox.

The tests find the program's names that they mention. A name of Python's own stays Python's, unless
the tests call nothing else of the program's: a program that replaced ``abs`` would decide what is
near enough. For the same reason modules of the standard library are the real ones, and so are
functions of some of them: the program may say where a name comes from, and would name an object
that equals everything.
"""

import ast
import builtins
import sys
import traceback

from tclora.evaluate.sandbox.peer import (
    CALLBACKS,
    ROOT,
    GoneError,
    Peer,
    Remote,
    from_library,
)
from tclora.evaluate.sandbox.values import receive, send

_WIRE, _VERDICT = 3, 4
# What tests take from a program that has imported it; nothing here agrees with every value.
_PLAIN = {
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools",
    "heapq", "itertools", "math", "operator", "random", "re", "statistics", "string",
}  # fmt: skip


def main(text: str) -> None:
    """Run tests and write what came of them: ``{"failed": reason or null}``."""
    sys.set_int_max_str_digits(0)
    send(_VERDICT, {"failed": _outcome(text)})


def _outcome(text: str) -> str | None:
    """Return why the program does not pass; None if it does."""
    peer = Peer(_WIRE, CALLBACKS, root=None, trusted=True)
    try:
        failed = receive(_WIRE)["failed"]
    except (EOFError, OSError, ValueError, KeyError, TypeError):
        return "the program ended before its tests began"
    if failed is not None:
        return f"the program failed:\n{failed}"
    try:
        names = _names(peer, text) | {"__name__": "tests"}
        exec(compile(text, "<tests>", "exec"), names)  # noqa: S102
    except GoneError:
        return "the program ended during its tests"
    except BaseException:  # tests that exit have not run to their end either
        return traceback.format_exc(limit=-1)[-2000:]
    return None


def _names(peer: Peer, text: str) -> dict[str, object]:
    """Return those of the program's names that the tests mention."""
    nodes = list(ast.walk(ast.parse(text)))
    called = {_id(node.func) for node in nodes if isinstance(node, ast.Call)}
    opened = {_id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    found = {}
    for name in sorted({_id(node) for node in nodes} - {""}):
        try:
            found[name] = Remote(peer, ROOT)[name]
        except KeyError:  # the tests' own, or Python's
            continue
    own = {name: value for name, value in found.items() if not hasattr(builtins, name)}
    modules = {name for name in own if name in sys.stdlib_module_names and name in opened}
    chosen = own if called & (own.keys() - modules) else found
    return {
        name: from_library(name, "") if name in modules else _genuine(peer, value)
        for name, value in chosen.items()
    }


def _id(node: ast.AST) -> str:
    """Return the name that a node is; empty for other nodes."""
    return node.id if isinstance(node, ast.Name) else ""


def _genuine(peer: Peer, value: object) -> object:
    """Return the function of the standard library that a value is said to be, else the value."""
    match peer.ask("origin", value) if isinstance(value, Remote) else None:
        case (str(module), str(name)) if module in _PLAIN and name and not name.startswith("_"):
            return from_library(module, name)
    return value
