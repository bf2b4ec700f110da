"""One request on its way through the engine, and what is known of it when it has ended."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tclora.serve.request import Piece


@dataclass
class Served:
    """A request that was routed, and how it was answered.

    Attributes
    ----------
    messages : list of dict
        The conversation.
    prompt : str
        What it was routed by.
    options : mapping
        How it was to be answered.
    route : mapping
        Where it was routed.
    prompt_tokens : int
        Length of the conversation (tokens).
    began, routed, ended : int
        Times (ns since 1970).
    text : str
        The answer, as far as it came.
    tokens : int
        Its length (tokens).
    finish, error : str or None
        How it has ended.
    """

    messages: list[dict[str, str]]
    prompt: str
    options: Mapping[str, Any]
    route: Mapping[str, Any]
    prompt_tokens: int
    began: int
    routed: int
    ended: int = 0
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    error: str | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Tokens as OpenAI's clients expect them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }

    def add(self, piece: Piece) -> bool:
        """Take a piece; return whether it was the last."""
        self.text, self.tokens, self.finish = self.text + piece.text, piece.tokens, piece.finish
        self.error = str(piece.error) if piece.error else None
        self.ended = time.time_ns()
        return bool(piece.finish or piece.error)


class Answer:
    """One request, seen from the event loop.

    Parameters
    ----------
    name : str
        Name of the model.
    on_end : callable, optional
        Called with what was served, in a thread of its own, when it has ended.
    """

    def __init__(self, name: str, on_end: Callable[[Served], None] | None = None) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.began = time.time_ns()
        self.name = name
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.served: Served | None = None
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()

    def put(self, piece: Piece) -> None:
        """Take a piece from the engine's thread."""
        self._loop.call_soon_threadsafe(self._take, piece)

    def _take(self, piece: Piece) -> None:
        self.pieces.put_nowait(piece)
        if self.served and self.served.add(piece) and self._on_end:
            self._loop.run_in_executor(None, self._on_end, self.served)

    def body(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the common part of a response."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.began // 10**9,
            "model": self.name,
            "choices": [{"index": 0, **choice}],
        }
