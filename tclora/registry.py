"""Registries of named variants: merge methods, routers, clusterers, training engines.

A variant registers itself when its module is imported. Modules of other packages are imported by
`load_plugins`, so that a variant from outside is picked up wherever ours are.
"""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from tclora.errors import ConfigError

ENTRY_POINTS = "tclora.plugins"  # group of entry points that name modules
VARIABLE = "TCLORA_PLUGINS"  # environment variable: names of modules, comma-separated

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Variants of one kind by name, in alphabetical order.

    Parameters
    ----------
    kind : str
        What the variants are, for messages, such as "merge method".
    describe : callable
        Returns a variant's summary of one line; the first of its docstring by default.
    named_by_rows : bool
        Whether it is the data that name variants, so that a function that looks one up can reach
        each of them, not only those that its code and its arguments name.
    """

    def __init__(
        self,
        kind: str,
        describe: Callable[[T], str] | None = None,
        *,
        named_by_rows: bool = False,
    ) -> None:
        self.kind = kind
        self.named_by_rows = named_by_rows
        self._describe = describe or _first_line
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters a variant under a name.

        Raises
        ------
        ValueError
            If the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} name must be new, got {name!r}, which is taken already")

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """Return a variant.

        Raises
        ------
        ValueError
            If there is none of this name; the message names the closest ones.
        """
        if name not in self._entries:
            raise ValueError(self.unknown(name))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, entry: object) -> str:
        """Return the name that a variant is registered under.

        Raises
        ------
        ValueError
            If it is not registered.
        """
        for name in self:
            if self._entries[name] is entry:
                return name
        raise ValueError(f"{self.kind} must be registered, got {entry!r}; register it by a name")

    def summary(self, name: str) -> str:
        """Return one line on a variant."""
        return self._describe(self[name])

    def module(self, name: str) -> str:
        """Return the module that defines a variant, whose source its results depend on."""
        entry = self[name]
        return str(getattr(entry, "function", entry).__module__)

    def unknown(self, name: str) -> str:
        """Say that a name is not registered, and which are close to it."""
        return f"{self.kind} must be a registered name, got {name!r}; {self.hint(name)}"

    def hint(self, name: str) -> str:
        """Say which names are close to a wrong one, or all names."""
        return closest(name, self)


def closest(given: str, known: Iterable[str]) -> str:
    """Say which known names are close to a wrong one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=2)
    return (
        f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names) or 'none'}"
    )


def _first_line(entry: object) -> str:
    """Return the first line of a docstring, nothing where there is none."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def plugin_modules() -> list[str]:
    """Name the modules that register variants of other packages; see `load_plugins`."""
    named = [point.module for point in entry_points(group=ENTRY_POINTS)]
    return named + [n.strip() for n in os.environ.get(VARIABLE, "").split(",") if n.strip()]


def load_plugins() -> None:
    """Import the modules that register variants of other packages.

    They are named by entry points of the group ``tclora.plugins`` and by ``$TCLORA_PLUGINS``.

    Raises
    ------
    ConfigError
        If one cannot be imported.
    """
    for name in plugin_modules():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"plugin {name!r} (entry points {ENTRY_POINTS}, ${VARIABLE}) cannot be imported: "
                f"{error}; install it or take it out"
            ) from error
