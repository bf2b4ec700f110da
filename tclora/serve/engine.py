"""Batched generation: requests that wait together are answered together, each by its own route.

One thread owns the model. It takes the requests that are waiting, up to the batch's size, answers
them in one ``generate`` call and hands every new piece of text to the request's callback. Requests
of one batch may differ in length, sampling and route. Those that arrive meanwhile form the next
batch.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from tclora.model.tokens import TokenRow, collate
from tclora.route.model import RoutedModel
from tclora.route.routing import together
from tclora.serve.batch import RowAnswers, RowSampling, RowStopping
from tclora.serve.request import Request

logger = logging.getLogger(__name__)

_WAIT = 0.005  # how long a batch waits for company (s)


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
        answers = RowAnswers(batch, self.model)
        try:
            self._generate(batch, answers)
        except Exception as error:  # the clients must hear of it, and the next batch be served
            logger.exception("a batch of %d requests failed", len(batch))
            answers.fail(error)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Request], answers: RowAnswers) -> None:
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
                logits_processor=LogitsProcessorList([RowSampling(batch)] if sampled else []),
                stopping_criteria=StoppingCriteriaList([RowStopping(answers)]),
            )
