"""Progress of parallel jobs: live bars on a terminal, log lines elsewhere, artifacts in Prefect."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
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
_PAUSE = 5.0  # between two updates of a job's artifact (s)


class JobProgress:
    """Shows how far each job is: log lines, or bars while `shown` on a terminal.

    In a task of Prefect's, its artifacts show it too.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._lock = Lock()
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, int] = {}
        self._artifacts: dict[str, _Artifact] = {}

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
        context = TaskRunContext.get()
        if of and context:
            shown = self._artifacts.setdefault(f"{context.task_run.id} {name}", _Artifact(name))
            shown.update(done, of, note)

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


class _Artifact:
    """A job's progress in Prefect's UI, told at most once in a while, and at its end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._id: UUID | None = None
        self._told = float("-inf")

    def update(self, done: int, of: int, note: str) -> None:
        if done < of and time.monotonic() - self._told < _PAUSE:
            return
        self._told = time.monotonic()
        share, text = 100 * min(1.0, done / of), f"{self._name}: {done} of {of}, {note}"
        try:
            if self._id is None:
                made: Any = create_progress_artifact(share, description=text)
                self._id = made
            else:
                update_progress_artifact(self._id, share, description=text)
        except (PrefectException, httpx.HTTPError) as error:  # the job is worth more than its bar
            get_run_logger().warning("Prefect did not take the progress: %s", error)


def _log_console() -> Console | None:
    handlers = logging.getLogger("prefect").handlers
    return next((h.console for h in handlers if isinstance(h, PrefectConsoleHandler)), None)
