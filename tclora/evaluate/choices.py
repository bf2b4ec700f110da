"""Multiple choice: the option of a row that a model finds most likely.

As in lm-eval, the white space that a prompt ends with belongs to every option, and acc_norm divides
an option's log-likelihood by the characters of its text. Options are tokenised by themselves, as
responses are in training; lm-eval tokenises prompt and option together, so that its figures are the
same where no token of its spans the border of the two, as behind a line's end that no other white
space follows.

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
from tclora.model.tokens import TokenRow, trailing_spaces


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
    prompts = frame["prompt"].tolist()
    spaces = trailing_spaces(tokenizer, prompts, template=template, shots=shots)
    moved = [min(n, len(row.prompt) - 1) for n, row in zip(spaces, rows, strict=True)]
    forks = [
        _fork(tokenizer, row, options, n, max_tokens)
        for row, options, n in zip(rows, frame["choices"], moved, strict=True)
    ]
    found = likelihoods(
        model, forks, pad_id=tokenizer.pad_token_id, token_budget=token_budget, context=context
    )
    return [_outcome(values, n) for values, n in zip(found, moved, strict=True)]


def _fork(
    tokenizer: PreTrainedTokenizerBase,
    row: TokenRow,
    options: Sequence[str],
    moved: int,
    max_tokens: int,
) -> Fork:
    """Return the options and, last, the response, behind the end of the prompt that is moved."""
    encoded = tokenizer(list(options), add_special_tokens=False).input_ids
    end = row.prompt[len(row.prompt) - moved :]
    continuations = tuple(end + tuple(tokens) for tokens in (*encoded, row.response))
    room = max(1, max_tokens - max(map(len, continuations)))
    return Fork(row.prompt[: len(row.prompt) - moved][-room:], continuations)


def _outcome(values: Sequence[Likelihood], moved: int) -> Choice:
    *options, response = values
    return Choice(tuple(o.total for o in options), -sum(response.logprobs[moved:]))
