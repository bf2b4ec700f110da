"""The source that a function can execute: its own and that of all it names, within the project.

A function's closure is found from the text of the modules alone: from a definition to the names it
uses, through imports (also inside of functions) to other top-level definitions, and so on. What it
looks up by name in a `Registry` is found among the registered variants by the names it is given; of
a registry whose variants the data name, each counts. Each definition counts by its syntax tree
without docstrings, so comments and layout do not. Of a class, a method counts where anything in the
closure uses its name.

Limits: a definition is a function, a class, a method or a constant at the top level of a module.
Methods that others may call count with their class: special ones, those under decorators that might
register them, and all where a base class is not known to call none. Computed names (``getattr``
with a variable) are not followed, except through a `Registry`; nor are modules that are passed on
as values. Other packages do not count: upgrading one leaves keys as they are.
"""

import ast
import hashlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from tclora.registry import Registry

PROJECT = ("tclora", "tasks")
# Fields of configuration sections count by the values a stage is given; their functions count.
_BY_VALUE = "tclora.config"
_EFFECTS = "<module>"  # what importing a module does beside defining names
# Bases that call no method by its name, and decorators that leave a method to its callers.
_PLAIN_BASES = {"NamedTuple", "Protocol", "BaseModel"}
_PLAIN_DECORATORS = {
    "property", "cached_property", "classmethod", "staticmethod", "contextmanager", "setter"
}  # fmt: skip

# Python 3.11 now and then fails where two threads parse at once (CPython issue 106905).
_PARSER = threading.Lock()

Finder = Callable[[str], Path | None]


class Symbol(NamedTuple):
    """A top-level definition: its module and its name, that of a method behind its class's."""

    module: str
    name: str


@dataclass(frozen=True)
class Closure:
    """What a function can execute.

    Attributes
    ----------
    definitions : Mapping[Symbol, str]
        Definition → SHA-256 of its syntax tree.
    names : frozenset of str
        Attributes that the definitions use, such as methods they call.
    """

    definitions: Mapping[Symbol, str]
    names: frozenset[str]

    @property
    def digest(self) -> str:
        """SHA-256 over all definitions."""
        lines = [f"{s.module}.{s.name} {d}" for s, d in sorted(self.definitions.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def find_source(module: str) -> Path | None:
    """Return the file of a module; None where there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def closure(
    roots: Iterable[object], given: Iterable[str] = (), find: Finder = find_source
) -> Closure:
    """Find what functions or classes can execute.

    Parameters
    ----------
    roots : iterable of functions or classes
        At the top level of their modules.
    given : iterable of str
        Strings among their arguments: the variants of registries that they may look up.
    find : callable
        Module → file to read, None where there is none.

    Returns
    -------
    Closure
    """
    start = [symbol for root in roots for symbol in symbols_of(root)]
    packages = {*PROJECT, *(symbol.module.partition(".")[0] for symbol in start)}
    search = _Search(find, packages, set(given))
    search.follow(start, decorated=False)
    return Closure(search.found, frozenset(search.attributes))


def symbols_of(value: object) -> Iterator[Symbol]:
    """Yield the definitions behind a function, a class, a partial or an object with its fields."""
    if isinstance(value, partial):
        yield from symbols_of(value.func)
    elif isinstance(value, (FunctionType, type)):
        yield Symbol(value.__module__, value.__qualname__.partition(".")[0])
    elif type(value).__module__ != "builtins":
        yield from symbols_of(type(value))
        for field in fields(value) if is_dataclass(value) else ():
            yield from symbols_of(getattr(value, field.name))


class _Search:
    """Walks from definition to definition."""

    def __init__(self, find: Finder, packages: set[str], given: set[str]) -> None:
        self.found: dict[Symbol, str] = {}
        self.attributes: set[str] = set()
        self._find = find
        self._packages = packages
        self._strings = given
        self._registries: list[Registry[Any]] = []
        self._entered: set[Symbol] = set()

    def follow(self, symbols: Iterable[Symbol], *, decorated: bool = True) -> None:
        """Add definitions and all they lead to; roots without their decorators."""
        queue = [(symbol, decorated) for symbol in symbols]
        while queue:
            symbol, whole = queue.pop()
            for place in self._resolve(symbol):
                if place not in self.found:
                    nodes, self.found[place] = _reduced(*self._source(place.module), place, whole)
                    queue += [(s, True) for node in nodes for s in self._enter(place, node)]
            if not queue:
                queue += [(symbol, True) for symbol in (*self._looked_up(), *self._called())]

    def _enter(self, symbol: Symbol, node: ast.AST) -> Iterator[Symbol]:
        """Yield what a definition names; remember its attributes, strings and registries."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            self._note_registry(symbol)
        module = self._index(symbol.module)
        local = dict(module.imports) | dict(_bindings(node, symbol.module, module.package))
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                self._strings.add(part.value)
            elif isinstance(part, ast.Attribute):
                self.attributes.add(part.attr)
                chain = _chain(part)
                if chain and chain[0] in local:
                    yield from self._through(local[chain[0]], chain[1:])
            elif isinstance(part, ast.Name):
                if part.id in local:
                    yield local[part.id]
                elif part.id in module.definitions:
                    yield Symbol(symbol.module, part.id)
        yield Symbol(symbol.module, _EFFECTS)

    def _through(self, target: Symbol, attributes: list[str]) -> Iterator[Symbol]:
        """Yield what an attribute of an imported module is."""
        for attribute in attributes:
            module = f"{target.module}.{target.name}" if target.name else target.module
            if not self._ours(module) or self._find(module) is None:
                return
            target = Symbol(module, attribute)
            yield target

    def _resolve(self, symbol: Symbol) -> Iterator[Symbol]:
        """Yield the definitions a name stands for, through imports of imports."""
        seen: set[Symbol] = set()
        queue = [symbol]
        while queue:
            here = queue.pop()
            if here in seen or not self._ours(here.module) or self._find(here.module) is None:
                continue
            seen.add(here)
            module = self._index(here.module)
            if here.name in module.definitions:
                yield here
            elif here.name in module.imports:
                queue.append(module.imports[here.name])
            elif "__getattr__" in module.definitions and here.name not in {"", _EFFECTS}:
                queue.append(Symbol(here.module, "__getattr__"))

    def _note_registry(self, symbol: Symbol) -> None:
        value = getattr(importlib.import_module(symbol.module), symbol.name, None)
        if isinstance(value, Registry):
            self._registries.append(value)

    def _looked_up(self) -> Iterator[Symbol]:
        """Yield the variants that the registries reached so far hold under any string seen."""
        for registry in self._registries:
            named = registry if registry.named_by_rows else set(registry) & self._strings
            for name in sorted(named):
                for symbol in symbols_of(registry[name]):
                    self._packages.add(symbol.module.partition(".")[0])
                    if symbol not in self._entered:
                        self._entered.add(symbol)
                        yield symbol

    def _called(self) -> Iterator[Symbol]:
        """Yield the methods of classes reached so far whose names anything uses."""
        used = self.attributes | self._strings
        for symbol in list(self.found):
            for method in self._index(symbol.module).methods.get(symbol.name, ()):
                called = Symbol(symbol.module, f"{symbol.name}.{method}")
                if method in used and called not in self.found:
                    yield called

    def _ours(self, module: str) -> bool:
        return module.partition(".")[0] in self._packages

    def _index(self, module: str) -> "_Module":
        return _parse(module, *self._source(module))

    def _source(self, module: str) -> tuple[Path, int]:
        """Return a module's file and its time stamp: a changed file is read again."""
        file = self._find(module)
        if file is None:
            raise ModuleNotFoundError(f"{module} has no source file")
        return file, file.stat().st_mtime_ns


@dataclass(frozen=True)
class _Module:
    """The top level of a module.

    Name → definitions, class → methods that are definitions of their own, name → what it was
    imported from.
    """

    package: bool
    definitions: Mapping[str, list[ast.AST]]
    methods: Mapping[str, list[str]]
    imports: Mapping[str, Symbol]


@cache
def _parse(module: str, file: Path, stamp: int) -> _Module:
    """Read a module."""
    package = file.name == "__init__.py"
    with _PARSER:
        tree = ast.parse(file.read_text(encoding="utf-8"))
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
        definitions[_EFFECTS] = [ast.Module(list(effects), [])]
    imports = {
        name: symbol
        for node in _top_level(tree.body)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name, symbol in _bindings(node, module, package)
    }
    return _Module(package, definitions, methods, imports)


@cache
def _reduced(file: Path, stamp: int, symbol: Symbol, decorated: bool) -> tuple[list[ast.AST], str]:
    """Return what counts of a definition, and its digest."""
    definitions = _parse(symbol.module, file, stamp).definitions[symbol.name]
    nodes = [_essence(node, symbol.module, decorated) for node in definitions]
    return nodes, hashlib.sha256("\n".join(map(ast.dump, nodes)).encode()).hexdigest()


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


def _bindings(node: ast.AST, module: str, package: bool) -> Iterator[tuple[str, Symbol]]:
    """Yield the names that import statements inside a node bind, and what they stand for."""
    for part in ast.walk(node):
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


def _essence(node: ast.AST, module: str, decorated: bool) -> ast.AST:
    """Return a definition without docstrings, configuration fields and a root's decorators."""
    node = deepcopy(node)
    for part in ast.walk(node):
        body = getattr(part, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            part.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    if isinstance(node, ast.ClassDef) and module.startswith(_BY_VALUE):
        functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        node.body = [*functions] or [ast.Pass()]
    if not decorated and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        node.decorator_list = []
    return node


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
