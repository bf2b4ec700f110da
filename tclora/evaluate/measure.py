"""Measuring a model on examples: response NLL, generated answers and choices, prompts once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.evaluate.choices import Choice, choose
from tclora.evaluate.context import RowContext, plain
from tclora.evaluate.scorers import CHOICES, Expected, score
from tclora.model.generation import plain_generation
from tclora.model.loss import response_nll
from tclora.model.tokens import IGNORED, Batch, TokenRow, batches, collate, encode_frame

NAN = float("nan")


@dataclass(frozen=True)
class Measurement:
    """One row's outcome.

    Attributes
    ----------
    nll : float
        Negative log-likelihood of the response, nats, summed over its tokens.
    tokens : int
        Response tokens, the end-of-sequence token included.
    generated : str or None
        The greedy answer, None where nothing was generated.
    """

    nll: float
    tokens: int
    generated: str | None = None


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    *,
    token_budget: int = 2048,
    max_new_tokens: int | None = None,
    context: RowContext = plain,
) -> list[Measurement]:
    """Measure response NLL and, where asked for, greedy answers.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        For padding and decoding.
    rows : sequence of TokenRow
        In any order.
    token_budget : int
        Padded tokens per forward pass.
    max_new_tokens : int, optional
        Longest answer; None generates nothing. Of the checkpoint's generation defaults only the
        end tokens count.
    context : callable, optional
        Takes the indices of a batch's rows, gives a context to compute the batch in, such as the
        rows' gates.

    Returns
    -------
    list of Measurement
        In the order of `rows`.

    Notes
    -----
    After generation the key-value cache of the prompt is cut back and reused for the response, so
    that the prompt is computed once for both figures.
    """
    results: dict[int, Measurement] = {}
    for batch in batches(
        rows,
        pad_id=tokenizer.pad_token_id,
        token_budget=token_budget,
        prompts_only=max_new_tokens is not None,
        room=max_new_tokens or 0,
    ):
        texts: Sequence[str | None] = [None] * len(batch.rows)
        with context(batch.rows):
            if max_new_tokens is None:
                nll = response_nll(model, batch).sum(1)
            else:
                nll, texts = _generate_and_score(model, tokenizer, rows, batch, max_new_tokens)
        for index, value, text in zip(batch.rows, nll.tolist(), texts, strict=True):
            results[index] = Measurement(value, len(rows[index].response), text)
    return [results[i] for i in range(len(rows))]


def _generate_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    batch: Batch,
    max_new_tokens: int,
) -> tuple[Tensor, list[str]]:
    device = model.device
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    width = ids.shape[1]
    generate: Any = model.generate
    with plain_generation(model, tokenizer):
        output = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
    texts = tokenizer.batch_decode(output.sequences[:, width:], skip_special_tokens=True)
    cache = output.past_key_values
    if any(getattr(cache, "is_sliding", ())):  # has forgotten what it would have to be cut back to
        chosen = [rows[i] for i in batch.rows]
        whole = collate(chosen, range(len(chosen)), tokenizer.pad_token_id)
        return response_nll(model, whole).sum(1), texts
    # The last prompt token is fed again: its logits predict the first response token.
    cache.crop(width - 1 - cache.get_seq_length())
    responses = [rows[i].response for i in batch.rows]
    longest = max(len(response) for response in responses)
    labels = torch.full((len(responses), longest), IGNORED)
    for place, response in enumerate(responses):
        labels[place, : len(response)] = torch.tensor(response)
    labels = labels.to(device)
    # What pads a response on the right is never attended to by the tokens before it.
    fed = torch.cat([ids[:, -1:], labels[:, :-1].clamp_min(0)], dim=1)
    logits = model(
        input_ids=fed,
        attention_mask=torch.cat([mask[:, :-1], torch.ones_like(fed)], dim=1),
        position_ids=mask.sum(1, keepdim=True) - 1 + torch.arange(longest, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits  # (rows, longest, vocabulary)
    nll = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return nll.sum(1), texts


def evaluate_frame(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    *,
    template: str,
    max_tokens: int,
    token_budget: int,
    max_new_tokens: int | None,
    context: RowContext = plain,
) -> pd.DataFrame:
    """Measure a model on canonical rows.

    Rows whose scorer is "choices" are answered by the log-likelihood of their options, the others
    by generated text.

    Parameters
    ----------
    model, tokenizer, token_budget, max_new_tokens, context
        See `measure`.
    frame : DataFrame
        Columns id, prompt, response, answer, scorer, metadata; choices where rows have some; shots
        where something is shown before a prompt.
    template, max_tokens
        See `tclora.model.tokens.encode`.

    Returns
    -------
    DataFrame
        Columns id; nll, tokens; generated; correct (0.0 to 1.0; NaN where nothing was generated),
        correct_norm (by length-normalised log-likelihood; NaN without choices) and logprobs
        (log-likelihood of every option, nats).
    """
    frame = frame.reset_index(drop=True)
    rows = encode_frame(tokenizer, frame, template=template, max_tokens=max_tokens)
    chosen = (frame["scorer"] == CHOICES).to_numpy()
    parts = []
    if not chosen.all():
        texts = np.flatnonzero(~chosen).tolist()
        found = measure(
            model,
            tokenizer,
            [rows[i] for i in texts],
            token_budget=token_budget,
            max_new_tokens=max_new_tokens,
            context=lambda batch: context([texts[i] for i in batch]),
        )
        parts.append(_of_texts(frame.iloc[texts], found))
    if chosen.any():
        choices = np.flatnonzero(chosen).tolist()
        asked = frame.iloc[choices]
        outcomes = choose(
            model,
            tokenizer,
            asked,
            [rows[i] for i in choices],
            template=template,
            max_tokens=max_tokens,
            token_budget=token_budget,
            context=lambda batch: context([choices[i] for i in batch]),
        )
        tokens = [len(rows[i].response) for i in choices]
        parts.append(_of_choices(asked, outcomes, tokens))
    return pd.concat(parts).sort_index() if parts else _of_texts(frame, [])


def _of_texts(frame: pd.DataFrame, found: Sequence[Measurement]) -> pd.DataFrame:
    """Return measurements of generated answers as a table, with the frame's index."""
    scores = [
        NAN if one.generated is None else score(scorer, one.generated, expected)
        for one, scorer, expected in zip(found, frame["scorer"], _expected(frame), strict=True)
    ]
    return _table(
        frame,
        nll=[one.nll for one in found],
        tokens=[one.tokens for one in found],
        generated=[one.generated for one in found],
        correct=scores,
        correct_norm=[NAN] * len(found),
        logprobs=[None] * len(found),
    )


def _of_choices(
    frame: pd.DataFrame, outcomes: Sequence[Choice], tokens: Sequence[int]
) -> pd.DataFrame:
    """Return the outcomes of multiple-choice rows as a table, with the frame's index."""
    known = list(zip(outcomes, frame["choices"], frame["answer"], strict=True))
    return _table(
        frame,
        nll=[one.nll for one in outcomes],
        tokens=tokens,
        generated=[None] * len(outcomes),
        correct=[one.correct(options, answer) for one, options, answer in known],
        correct_norm=[
            one.correct(options, answer, by_length=True) for one, options, answer in known
        ],
        logprobs=[list(one.logprobs) for one in outcomes],
    )


def _table(frame: pd.DataFrame, **columns: Sequence[Any]) -> pd.DataFrame:
    """Return columns beside the rows' ids; texts and lists stay what they are."""
    types = {"generated": object, "logprobs": object}
    values = {
        name: pd.Series(values, index=frame.index, dtype=types.get(name))
        for name, values in columns.items()
    }
    return pd.DataFrame({"id": frame["id"], **values})


def _expected(frame: pd.DataFrame) -> Iterator[Expected]:
    for row in frame.to_dict("records"):
        yield Expected(
            answer=row["answer"],
            prompt=row["prompt"],
            response=row["response"],
            choices=tuple(row["choices"]) if row.get("choices") is not None else (),
            metadata=row["metadata"],
        )
