"""Something that is done again and again beside a block, in a thread of its own."""

import threading
from collections.abc import Callable
from contextvars import copy_context
from types import TracebackType
from typing import Self


class Repeating:
    """Calls a function every few seconds while a block runs, and a last time at its end.

    Parameters
    ----------
    work : callable
        Must not raise. It runs in the caller's context, by which Prefect's loggers are found.
    pause : float
        Time between two calls (s).
    """

    def __init__(self, work: Callable[[], None], pause: float) -> None:
        self._work, self._pause = work, pause
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._repeat,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Call it a last time, and return when it has been; once is enough."""
        self._ended.set()
        self._thread.join()

    def _repeat(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._pause)
            self._work()
