"""Multiple choice: the option of a row that a model finds most likely.

As in lm-eval, the white space that a prompt ends with belongs to every option, prompt and option
are turned into tokens together and parted behind as many as the prompt has alone, and acc_norm
divides an option's log-likelihood by the characters of its text.

References
----------
Gao et al. (2024), "The Language Model Evaluation Harness", zenodo 12608602.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.evaluate.context import RowContext, plain
from tclora.evaluate.continuations import Fork, Likelihood, likelihoods
from tclora.model.tokens import TokenRow, fit, render, template_head


@dataclass(frozen=True)
class Choice:
    """One multiple-choice row's outcome.

    Attributes
    ----------
    logprobs : tuple of float
        Log-likelihood of every option (nats).
    nll : float
        Negative log-likelihood of the response, as of other rows (nats).
    """

    logprobs: tuple[float, ...]
    nll: float

    def correct(self, options: Sequence[str], answer: str, *, by_length: bool = False) -> float:
        """Return 1.0 if the most likely option is the answer, else 0.0; the first of equal ones.

        Parameters
        ----------
        options : sequence of str
            The options' texts.
        answer : str
            One of them.
        by_length : bool
            Divide log-likelihoods by the number of characters.
        """
        lengths = [len(option) if by_length else 1 for option in options]
        best = int(np.argmax(np.asarray(self.logprobs) / lengths))
        return float(options[best] == answer)


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    rows: Sequence[TokenRow],
    *,
    template: str,
    max_tokens: int,
    token_budget: int,
    context: RowContext = plain,
) -> list[Choice]:
    """Measure options and responses of multiple-choice rows.

    Parameters
    ----------
    model, tokenizer, token_budget, context
        See `tclora.evaluate.continuations.likelihoods`.
    frame : DataFrame
        Columns prompt, choices, and shots where some are shown.
    rows : sequence of TokenRow
        The same rows in tokens.
    template, max_tokens
        That they were encoded with.

    Returns
    -------
    list of Choice
        In the order of the rows.
    """
    shots = frame["shots"].tolist() if "shots" in frame else None
    texts = render(tokenizer, frame["prompt"].tolist(), template, shots)
    asked = _encode(tokenizer, texts, frame["choices"].tolist(), special=template == "plain")
    head = template_head(tokenizer, template)
    forks = [
        (number, fork)
        for number, (options, row) in enumerate(zip(asked, rows, strict=True))
        for fork in _forks(options, row, max_tokens, head)
    ]
    found = likelihoods(
        model,
        [fork for _, fork in forks],
        pad_id=tokenizer.pad_token_id,
        token_budget=token_budget,
        context=lambda batch: context([forks[i][0] for i in batch]),
    )
    values: list[list[Likelihood]] = [[] for _ in rows]
    for (number, _), more in zip(forks, found, strict=True):
        values[number] += more
    return [_outcome(*parts) for parts in zip(values, asked, rows, strict=True)]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    special: bool,
) -> list[Fork]:
    """Return the options behind each rendered prompt, as lm-eval parts the two."""
    bare = [text.rstrip() or text for text in texts]
    pairs = [text + option for text, own in zip(texts, options, strict=True) for option in own]
    prompts = tokenizer(bare, add_special_tokens=special).input_ids
    wholes = iter(tokenizer(pairs, add_special_tokens=special).input_ids)
    forks = []
    for prompt, own in zip(prompts, options, strict=True):
        encoded = [next(wholes) for _ in own]
        # Where an option adds no token of its own, the last one counts.
        parted = [tuple(whole[len(prompt) :] or whole[-1:]) for whole in encoded]
        forks.append(Fork(tuple(prompt), tuple(parted)))
    return forks


def _forks(asked: Fork, row: TokenRow, max_tokens: int, head: int) -> list[Fork]:
    """Return what is computed for a row: its options and, last, its response, in one if it can be.

    A prompt that is cut for its options is another one than the response's.
    """
    fitted = fit(asked.prompt, max(asked.continuations, key=len), max_tokens, head)
    same = [a == b for a, b in zip(asked.prompt, row.prompt, strict=False)]
    shared = same.index(False) if False in same else len(same)
    if fitted.truncated or row.truncated or not shared:
        options = tuple(tokens[: len(fitted.response)] for tokens in asked.continuations)
        return [Fork(fitted.prompt, options), Fork(row.prompt, (row.response,))]
    options = tuple(asked.prompt[shared:] + tokens for tokens in asked.continuations)
    return [Fork(row.prompt[:shared], (*options, row.prompt[shared:] + row.response))]


def _outcome(values: Sequence[Likelihood], asked: Fork, row: TokenRow) -> Choice:
    """Return the sums over the options and over the response, without what is of the prompt."""
    lengths = [len(tokens) for tokens in (*asked.continuations, row.response)]
    *options, response = (
        sum(value.logprobs[-length:]) for value, length in zip(values, lengths, strict=True)
    )
    return Choice(tuple(options), -response)
