"""Progress of parallel jobs: live bars on a terminal, log lines elsewhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from prefect import get_run_logger
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.theme import Theme

_LINES = 4  # log lines per job where there is no terminal


class JobProgress:
    """Shows how far each job is: log lines, or bars while `shown` on a terminal."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._lock = Lock()
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, int] = {}

    def update(self, name: str, done: int, of: int, note: str) -> None:
        """Show that a job has done so many of its steps or rows."""
        with self._lock:
            if self._bars:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=of, note="")
                self._bars.update(self._tasks[name], completed=done, note=note)
            elif of and done * _LINES // of > self._lines.get(name, 0):
                self._lines[name] = done * _LINES // of
                get_run_logger().info("%s: %d of %d, %s", name, done, of, note)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show live bars for the jobs of a block, where Prefect logs to a terminal."""
        self._tasks, self._lines = {}, {}
        console = _log_console()
        if console is None or not console.is_terminal:
            yield
            return
        console.push_theme(Theme())  # Prefect's own lacks the styles of bars
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        # On the console of Prefect's log handler, or the two would overwrite each other.
        with Progress(*columns, console=console, transient=True) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None


def _log_console() -> Console | None:
    handlers = logging.getLogger("prefect").handlers
    return next((h.console for h in handlers if isinstance(h, PrefectConsoleHandler)), None)
