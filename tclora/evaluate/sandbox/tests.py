"""What runs in the tests' sandbox: unit tests on functions that are in another sandbox.

The tests find the program's names that they mention. A name of Python's own stays Python's, unless
it is the one thing the tests ask the program for: a program that replaced ``abs`` would decide what
is near enough. Modules and functions of the standard library that the program imported are the real
ones.
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
    mentioned = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    found = {}
    for name in sorted(mentioned):
        try:
            found[name] = Remote(peer, ROOT)[name]
        except KeyError:  # the tests' own, or Python's
            continue
    own = {name: value for name, value in found.items() if not hasattr(builtins, name)}
    return {name: _genuine(peer, name, value) for name, value in (own or found).items()}


def _genuine(peer: Peer, name: str, value: object) -> object:
    """Return what of the standard library a name stands for, else what the program has there."""
    if name in sys.stdlib_module_names:
        return from_library(name, "")
    origin = peer.ask("origin", value) if isinstance(value, Remote) else None
    return from_library(*map(str, origin)) if isinstance(origin, tuple) else value
