"""Padded tokens per forward pass, halved where they exceed the device's memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from tclora.errors import ModelError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class TokenBudget:
    """How many tokens a forward pass may have; what ran out of memory is tried with half.

    What pads counts too.

    Parameters
    ----------
    tokens : int
        As configured.

    Attributes
    ----------
    tokens : int
        The present budget; it never grows again.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def within(self, compute: Callable[[int], T], undo: Callable[[], None], longest: int) -> T:
        """Compute with the present budget, and again with half of it for as long as memory lacks.

        Parameters
        ----------
        compute : callable
            Takes the budget (tokens).
        undo : callable
            Takes back what an interrupted computation has left, such as gradients.
        longest : int
            Tokens of the longest row; it is one forward pass by itself, which nothing can halve.

        Raises
        ------
        ModelError
            If one row alone exceeds the memory.
        """
        while True:
            try:
                return compute(self.tokens)
            except torch.OutOfMemoryError as error:
                undo()
                if self.tokens <= longest:
                    raise ModelError(
                        f"a row of {longest} tokens must fit the device's memory; lower "
                        "train.max_tokens or set train.gradient_checkpointing=true"
                    ) from error
                self.tokens //= 2
            # Outside of the handler: its traceback holds what is to be freed.
            logger.warning(
                "out of memory: train.tokens_per_forward is %d from here on", self.tokens
            )
            torch.cuda.empty_cache()
