"""The top-level definitions of a module: which there are, what counts of each, what it names.

Each definition counts by its syntax tree without docstrings, so comments and layout do not. Methods
are definitions of their own where nobody can call them without their name: not special ones, those
under decorators that might register them, and those of a class whose base might call them. Fields
of configuration sections count by the values a stage is given; their functions count.
"""

import ast
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

EFFECTS = "<module>"  # what importing a module does beside defining names
_BY_VALUE = "tclora.config"
# Bases that call no method by its name, and decorators that leave a method to its callers.
_PLAIN_BASES = {"NamedTuple", "Protocol", "BaseModel"}
_PLAIN_DECORATORS = {
    "property", "cached_property", "classmethod", "staticmethod", "contextmanager", "setter"
}  # fmt: skip

# Python 3.11 now and then fails where two threads parse at once (CPython issue 106905).
_PARSER = threading.Lock()


class Symbol(NamedTuple):
    """A top-level definition: its module and its name, that of a method behind its class's."""

    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """The top level of a module.

    Name → definitions, class → methods that are definitions of their own, name → what it was
    imported from.
    """

    package: bool
    definitions: Mapping[str, list[ast.AST]]
    methods: Mapping[str, list[str]]
    imports: Mapping[str, Symbol]


@cache
def parse(module: str, file: Path, stamp: int) -> Module:
    """Read a module."""
    package = file.name == "__init__.py"
    with _PARSER:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    _strip(tree)
    definitions: dict[str, list[ast.AST]] = {}
    methods: dict[str, list[str]] = {}
    for node in _top_level(tree.body):
        for name in _defined(node):
            definitions.setdefault(name, []).append(node)
        if isinstance(node, ast.ClassDef):
            for method in _take_methods(node):
                definitions.setdefault(f"{node.name}.{method.name}", []).append(method)
                methods.setdefault(node.name, []).append(method.name)
    effects = [n for n in tree.body if isinstance(n, ast.Expr) and not _is_text(n)]
    if effects:
        definitions[EFFECTS] = [ast.Module(list(effects), [])]
    imports = dict(_bindings(_top_level(tree.body), module, package))
    return Module(package, definitions, methods, imports)


@dataclass(frozen=True)
class Definition:
    """What counts of a definition, and what it names.

    SHA-256, whether it is an assignment, the strings and attributes in it, the definitions and
    modules that it names, those with attributes that lead on from them.
    """

    digest: str
    assigned: bool
    strings: frozenset[str]
    attributes: frozenset[str]
    names: tuple[Symbol, ...]
    chains: tuple[tuple[Symbol, tuple[str, ...]], ...]


@cache
def read(file: Path, stamp: int, symbol: Symbol, decorated: bool) -> Definition:
    """Read a definition of a module."""
    module = parse(symbol.module, file, stamp)
    nodes = [_essence(node, symbol.module, decorated) for node in module.definitions[symbol.name]]
    strings: set[str] = set()
    attributes: set[str] = set()
    names: dict[Symbol, None] = {}  # in the order of the source
    chains: dict[tuple[Symbol, tuple[str, ...]], None] = {}
    for node in nodes:
        parts = list(ast.walk(node))
        local = dict(module.imports) | dict(_bindings(parts, symbol.module, module.package))
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                strings.add(part.value)
            elif isinstance(part, ast.Attribute):
                attributes.add(part.attr)
                chain = _chain(part)
                if chain and chain[0] in local:
                    chains[local[chain[0]], tuple(chain[1:])] = None
            elif isinstance(part, ast.Name):
                if part.id in local:
                    names[local[part.id]] = None
                elif part.id in module.definitions:
                    names[Symbol(symbol.module, part.id)] = None
    return Definition(
        digest=hashlib.sha256("\n".join(map(ast.dump, nodes)).encode()).hexdigest(),
        assigned=any(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in nodes),
        strings=frozenset(strings),
        attributes=frozenset(attributes),
        names=tuple(names),
        chains=tuple(chains),
    )


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements of a module's top level, those inside of ``if`` and ``try`` too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def _take_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Take the methods out of a class that count only where they are called."""
    if {_last_name(base) for base in node.bases} - _PLAIN_BASES:
        return []
    taken = [
        part
        for part in node.body
        if isinstance(part, ast.FunctionDef)
        and not part.name.startswith(("__", "model_"))  # Python and pydantic call those
        and {_last_name(mark) for mark in part.decorator_list} <= _PLAIN_DECORATORS
    ]
    node.body = [part for part in node.body if part not in taken] or [ast.Pass()]
    return taken


def _last_name(node: ast.expr) -> str:
    """Return ``"c"`` for ``a.b.c``, ``c[d]`` and ``c``; empty for anything else."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return getattr(node, "attr", getattr(node, "id", ""))


def _bindings(parts: Iterable[ast.AST], module: str, package: bool) -> Iterator[tuple[str, Symbol]]:
    """Yield the names that the import statements among nodes bind, and what they stand for."""
    for part in parts:
        if isinstance(part, ast.Import):
            for alias in part.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, Symbol(whole, "")
        elif isinstance(part, ast.ImportFrom):
            origin = _absolute(part, module, package)
            yield from ((a.asname or a.name, Symbol(origin, a.name)) for a in part.names)


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, node.module] if node.module else parts)


def _chain(node: ast.Attribute) -> list[str]:
    """Return ``["a", "b", "c"]`` for ``a.b.c``; empty where it does not begin with a name."""
    names = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return [value.id, *reversed(names)] if isinstance(value, ast.Name) else []


def _strip(tree: ast.Module) -> None:
    """Remove docstrings."""
    for part in ast.walk(tree):
        body = getattr(part, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            part.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]


def _essence(node: ast.AST, module: str, decorated: bool) -> ast.AST:
    """Return a definition without configuration fields and a root's decorators."""
    if isinstance(node, ast.ClassDef) and module.startswith(_BY_VALUE):
        node = copy(node)
        node.body = [n for n in node.body if isinstance(n, ast.FunctionDef)] or [ast.Pass()]
    if not decorated and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        node = copy(node)
        node.decorator_list = []
    return node


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
