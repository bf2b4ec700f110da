"""What the engine is asked, and what it hands out."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tclora.route.routing import Routing

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """What a request's callback receives.

    Attributes
    ----------
    text : str
        New text, possibly empty.
    tokens : int
        Tokens generated so far.
    finish : {"stop", "length", "cancelled"} or None
        Why the answer ended; None while it goes on.
    error : Exception or None
        Why there is no (more) answer.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes
    ----------
    tokens : tuple of int
        The prompt in its template.
    routing : Routing
        Its own, of one prompt.
    on_piece : callable
        Called in the engine's thread with every piece; the last has a finish or an error.
    max_tokens : int
        Longest answer (tokens).
    temperature : float
        0 decodes greedily.
    top_p : float
        Nucleus to sample from (probability, 0–1).
    stop : tuple of str
        The answer ends before any of them.
    cancelled : Event
        Set it to end the answer early.
    """

    tokens: tuple[int, ...]
    routing: Routing
    on_piece: Callable[[Piece], None]
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
