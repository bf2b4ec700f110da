"""Batched generation: requests that wait together are answered together, each by its own route.

One thread owns the model. It takes the requests that are waiting, up to the batch's size, answers
them in one ``generate`` call and hands every new piece of text to the request's callback. Requests
of one batch may differ in length, sampling and route. Those that arrive meanwhile form the next
batch.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tclora.model.tokens import TokenRow, collate
from tclora.route.model import RoutedModel
from tclora.route.routing import Routing, together

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length", "cancelled"]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to
_WAIT = 0.005  # how long a batch waits for company (s)


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


class Engine:
    """Answers requests in batches in a thread of its own.

    Parameters
    ----------
    model : RoutedModel
        Used by this engine alone.
    max_batch : int
        Requests answered together.
    max_waiting : int
        Requests that may wait; more are refused.
    """

    def __init__(self, model: RoutedModel, max_batch: int = 16, max_waiting: int = 256) -> None:
        self.model = model
        self._max_batch = max_batch
        self._closed = False
        self._waiting: queue.Queue[Request | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="tclora-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        """Whether the engine answers."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        queue.Full
            If too many wait already.
        RuntimeError
            If the engine has been closed.
        """
        if self._closed or not self.alive:
            raise RuntimeError("the engine is closed")
        self._waiting.put_nowait(request)

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._closed = True
        if self.alive:
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < self._max_batch and not last:
                try:
                    request = self._waiting.get(timeout=_WAIT)
                except queue.Empty:
                    break
                if request is None:
                    last = True
                else:
                    batch.append(request)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: Sequence[Request]) -> None:
        answers = _Answers(batch, self.model)
        try:
            self._generate(batch, answers)
        except Exception as error:  # the clients must hear of it, and the next batch be served
            logger.exception("a batch of %d requests failed", len(batch))
            answers.fail(error)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Request], answers: "_Answers") -> None:
        model, tokenizer = self.model.model, self.model.tokenizer
        rows = [TokenRow(request.tokens, ()) for request in batch]
        padded = collate(rows, range(len(rows)), tokenizer.pad_token_id, prompts_only=True)
        sampled = any(request.temperature > 0 for request in batch)
        generate: Any = model.generate
        with self.model.routed(together([request.routing for request in batch])):
            generate(
                input_ids=padded.input_ids.to(model.device),
                attention_mask=padded.attention_mask.to(model.device),
                max_new_tokens=max(request.max_tokens for request in batch),
                do_sample=sampled,
                **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
                pad_token_id=tokenizer.pad_token_id,
                streamer=answers,
                logits_processor=LogitsProcessorList([_RowSampling(batch)] if sampled else []),
                stopping_criteria=StoppingCriteriaList([_RowStopping(answers)]),
            )


class _Answers(BaseStreamer):
    """Takes the tokens of all rows step by step and hands their text to the requests."""

    def __init__(self, batch: Sequence[Request], model: RoutedModel) -> None:
        self._rows = [_Answer(request, model.tokenizer, model.end_tokens) for request in batch]
        self._prompt_seen = False

    @property
    def finished(self) -> list[bool]:
        """Whether each row has ended."""
        return [row.finished for row in self._rows]

    def put(self, value: Tensor) -> None:
        """Take the prompts (rows, T) once, then one token of every row (rows,) per step."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.add(token)

    def end(self) -> None:
        """End the rows that the model has ended in a way of its own."""
        for row in self._rows:
            row.end()

    def fail(self, error: Exception) -> None:
        """End every row that goes on with an error."""
        for row in self._rows:
            row.fail(error)


class _Answer:
    """The text of one row, handed out as far as it is certain."""

    def __init__(
        self, request: Request, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._ends = ends
        self._tokens: list[int] = []
        self._given = 0  # characters handed out
        self.finished = False

    def add(self, token: int) -> None:
        if self.finished:
            return
        self._tokens.append(token)
        ended = token in self._ends
        text = self._text()
        ends = [at for stop in self._request.stop if (at := text.find(stop)) >= 0]
        if ends:
            self._give(text[: min(ends)], "stop")
        elif ended:
            self._give(text, "stop")
        elif len(self._tokens) >= self._request.max_tokens:
            self._give(text, "length")
        elif self._request.cancelled.is_set():
            self._give(text, "cancelled")
        else:
            self._give(text[: self._certain(text)], None)

    def end(self) -> None:
        if not self.finished:
            self._give(self._text(), "stop")

    def fail(self, error: Exception) -> None:
        if not self.finished:
            self._hand(Piece("", len(self._tokens), error=error))
            self.finished = True

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _hand(self, piece: Piece) -> None:
        """Call the request back; one that cannot be reached any more ends here."""
        try:
            self._request.on_piece(piece)
        except RuntimeError as error:  # its event loop is closed
            logger.warning("a client cannot be reached: %s", error)
            self.finished = True

    def _certain(self, text: str) -> int:
        """Length of the text that no further token can change or make part of a stop string."""
        whole = text.rstrip(_INCOMPLETE)
        held = 0
        for stop in self._request.stop:
            for length in range(min(len(stop) - 1, len(whole)), held, -1):
                if whole.endswith(stop[:length]):
                    held = length
                    break
        return len(whole) - held

    def _give(self, text: str, finish: Finish | None) -> None:
        new, self._given = text[self._given :], max(self._given, len(text))
        if new or finish:
            self._hand(Piece(new, len(self._tokens), finish))
        self.finished = self.finished or finish is not None


class _RowStopping(StoppingCriteria):
    """Ends each row when its answer has ended."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return torch.tensor(self._answers.finished, device=input_ids.device)


class _RowSampling(LogitsProcessor):
    """Gives each row its own temperature and nucleus; temperature 0 leaves one token."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self._temperature = torch.tensor([request.temperature for request in batch])
        self._top_p = torch.tensor([request.top_p for request in batch])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        temperature = self._temperature.to(scores)[:, None]
        top_p = self._top_p.to(scores)[:, None]
        warm = scores / torch.where(temperature > 0, temperature, 1)
        ordered, order = warm.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        keep = (before < top_p) & (temperature > 0)
        keep[:, 0] = True
        dropped = torch.zeros_like(keep).scatter(1, order, ~keep)
        return warm.masked_fill(dropped, -torch.inf)
