"""Measuring a model on examples: response NLL and generated answers, prompts computed once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.evaluate.scoring import score
from tclora.model.generation import plain_generation
from tclora.model.loss import response_nll
from tclora.model.tokens import IGNORED, Batch, TokenRow, batches, collate, encode_frame

RowContext = Callable[[Sequence[int]], AbstractContextManager[None]]


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
    context: RowContext = lambda _: nullcontext(),
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
    context: RowContext = lambda _: nullcontext(),
) -> pd.DataFrame:
    """Measure a model on canonical rows.

    Parameters
    ----------
    model, tokenizer, token_budget, max_new_tokens, context
        See `measure`.
    frame : DataFrame
        Columns id, prompt, response, answer, scorer, metadata.
    template, max_tokens
        See `tclora.model.tokens.encode`.

    Returns
    -------
    DataFrame
        Columns id, nll, tokens, generated, correct (0.0 or 1.0; NaN where nothing was generated).
    """
    rows = encode_frame(tokenizer, frame, template=template, max_tokens=max_tokens)
    outcomes = measure(
        model,
        tokenizer,
        rows,
        token_budget=token_budget,
        max_new_tokens=max_new_tokens,
        context=context,
    )
    columns = [frame[name].tolist() for name in ("scorer", "answer", "metadata")]
    correct = [
        float("nan") if o.generated is None else score(scorer, o.generated, answer, metadata)
        for o, scorer, answer, metadata in zip(outcomes, *columns, strict=True)
    ]
    return pd.DataFrame(
        {
            "id": frame["id"].tolist(),
            "nll": [o.nll for o in outcomes],
            "tokens": [o.tokens for o in outcomes],
            "generated": pd.Series([o.generated for o in outcomes], dtype=object),
            "correct": correct,
        }
    )
