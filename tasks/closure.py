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

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

from tasks.definitions import EFFECTS, Definition, Module, Symbol, parse, read
from tclora.registry import Registry

PROJECT = ("tclora", "tasks")

Finder = Callable[[str], Path | None]


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
        self._sources: dict[str, tuple[Path, int]] = {}
        self._modules: dict[str, Module] = {}

    def follow(self, symbols: Iterable[Symbol], *, decorated: bool = True) -> None:
        """Add definitions and all they lead to; roots without their decorators."""
        queue = [(symbol, decorated) for symbol in symbols]
        while queue:
            symbol, whole = queue.pop()
            for place in self._resolve(symbol):
                if place not in self.found:
                    definition = read(*self._source(place.module), place, whole)
                    self.found[place] = definition.digest
                    queue += [(s, True) for s in self._enter(place, definition)]
            if not queue:
                queue += [(symbol, True) for symbol in (*self._looked_up(), *self._called())]

    def _enter(self, symbol: Symbol, definition: Definition) -> Iterator[Symbol]:
        """Yield what a definition names; remember its attributes, strings and registries."""
        if definition.assigned:
            self._note_registry(symbol)
        self._strings |= definition.strings
        self.attributes |= definition.attributes
        yield from definition.names
        for target, attributes in definition.chains:
            yield from self._through(target, attributes)
        yield Symbol(symbol.module, EFFECTS)

    def _through(self, target: Symbol, attributes: Iterable[str]) -> Iterator[Symbol]:
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
            elif "__getattr__" in module.definitions and here.name not in {"", EFFECTS}:
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

    def _index(self, module: str) -> Module:
        if module not in self._modules:
            self._modules[module] = parse(module, *self._source(module))
        return self._modules[module]

    def _source(self, module: str) -> tuple[Path, int]:
        """Return a module's file and its time stamp: the next search reads a changed file again."""
        if module not in self._sources:
            file = self._find(module)
            if file is None:
                raise ModuleNotFoundError(f"{module} has no source file")
            self._sources[module] = file, file.stat().st_mtime_ns
        return self._sources[module]
