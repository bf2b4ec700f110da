"""One ``generate`` call for several requests: each its own text, end and sampling."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tclora.route.model import RoutedModel
from tclora.serve.request import Finish, Piece, Request

logger = logging.getLogger(__name__)
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class RowAnswers(BaseStreamer):
    """Takes the tokens of all rows step by step and hands their text to the requests."""

    def __init__(self, batch: Sequence[Request], model: RoutedModel) -> None:
        self._rows = [_RowAnswer(request, model.tokenizer, model.end_tokens) for request in batch]
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


class _RowAnswer:
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


class RowStopping(StoppingCriteria):
    """Ends each row when its answer has ended."""

    def __init__(self, answers: RowAnswers) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return which rows are finished."""
        return torch.tensor(self._answers.finished, device=input_ids.device)


class RowSampling(LogitsProcessor):
    """Gives each row its own temperature and nucleus; temperature 0 leaves one token."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self._temperature = torch.tensor([request.temperature for request in batch])
        self._top_p = torch.tensor([request.top_p for request in batch])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores as each row is sampled."""
        temperature = self._temperature.to(scores)[:, None]
        top_p = self._top_p.to(scores)[:, None]
        warm = scores / torch.where(temperature > 0, temperature, 1)
        ordered, order = warm.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        keep = (before < top_p) & (temperature > 0)
        keep[:, 0] = True
        dropped = torch.zeros_like(keep).scatter(1, order, ~keep)
        return warm.masked_fill(dropped, -torch.inf)
