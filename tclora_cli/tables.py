"""Tables of figures on a terminal."""

from copy import copy

from rich.console import Console
from rich.table import Table

_ANY = 10_000  # columns that no table has


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as its content: a narrower terminal breaks lines, no figure is cut."""
    wide = copy(console)
    wide.width = _ANY
    wide.width = wide.measure(table).maximum
    wide.print(table)
