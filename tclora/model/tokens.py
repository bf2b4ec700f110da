"""Examples as token sequences: the prompt in a template, then the supervised response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Shown = Sequence[tuple[str, str]]  # prompts with their responses, shown before a prompt
Shots = Sequence[Shown]  # one per row
IGNORED = -100  # label of a position without loss, as torch's cross-entropy has it
_PROMPT_SHARE = 0.25  # of the longest row that a prompt keeps, however long its response


@dataclass(frozen=True)
class TokenRow:
    """One example in tokens.

    Attributes
    ----------
    prompt, response : tuple of int
        Token ids; the response ends with the end-of-sequence token unless it was truncated.
    truncated : bool
        Whether tokens were cut to respect the limit.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Left-padded rows, so that all responses end in the last column.

    Attributes
    ----------
    input_ids, attention_mask, position_ids : Tensor
        (rows, T) int64.
    labels : Tensor
        (rows, S) int64 for the last S columns; `IGNORED` where no response token stands. S is one
        more than the longest response: a position predicts the next token.
    rows : tuple of int
        Indices of the rows in the sequence the batch was made from.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    rows: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of response tokens."""
        return int((self.labels != IGNORED).sum())


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    template: str = "chat",
    max_tokens: int = 1024,
    shots: Shots | None = None,
) -> list[TokenRow]:
    """Turn prompts and responses into token rows.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The base model's tokenizer.
    prompts, responses : sequence of str
        Equal in length.
    template : {"chat", "plain"}
        The tokenizer's chat template with the prompt as the user's turn, or the prompt and a
        newline.
    max_tokens : int
        Longest row in tokens. What exceeds it is cut from the start of the prompt, behind what the
        template begins with, down to a quarter of `max_tokens`; beyond that the response loses its
        end.
    shots : sequence of sequences of (prompt, response), optional
        What is shown before each prompt: earlier turns of a chat, or text and an empty line.

    Returns
    -------
    list of TokenRow

    Raises
    ------
    ValueError
        If the template is unknown, or the tokenizer has no chat template.
    """
    texts = render(tokenizer, prompts, template, shots)
    # A rendered chat template already carries the special tokens.
    encoded = tokenizer(texts, add_special_tokens=template == "plain").input_ids
    answers = tokenizer(list(responses), add_special_tokens=False).input_ids
    eos, head = tokenizer.eos_token_id, template_head(tokenizer, template)
    return [
        fit(tuple(p), (*a, eos), max_tokens, head) for p, a in zip(encoded, answers, strict=True)
    ]


def encode_frame(
    tokenizer: "PreTrainedTokenizerBase", frame: "pd.DataFrame", *, template: str, max_tokens: int
) -> list[TokenRow]:
    """Turn the prompts and responses of a frame into token rows; see `encode`.

    A column ``shots`` counts where the frame has one.
    """
    return encode(
        tokenizer,
        frame["prompt"].tolist(),
        frame["response"].tolist(),
        template=template,
        max_tokens=max_tokens,
        shots=frame["shots"].tolist() if "shots" in frame else None,
    )


def render(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    template: str,
    shots: Shots | None = None,
) -> list[str]:
    """Write prompts in a template; see `encode`.

    Raises
    ------
    ValueError
        If the template is unknown, or the tokenizer has no chat template.
    """
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError("train.template must be 'plain': this tokenizer has no chat template")
    if template not in {"chat", "plain"}:
        raise ValueError(f"train.template must be 'chat' or 'plain', got {template!r}")
    before = shots if shots is not None else [()] * len(prompts)
    return [_render(tokenizer, *row, template) for row in zip(prompts, before, strict=True)]


def _render(tokenizer: "PreTrainedTokenizerBase", prompt: str, shots: Shown, template: str) -> str:
    if template == "plain":
        return "".join(f"{asked}\n{answered}\n\n" for asked, answered in shots) + f"{prompt}\n"
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    turns.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def template_head(tokenizer: "PreTrainedTokenizerBase", template: str) -> int:
    """Return how many tokens a template begins with, whatever the prompt."""
    texts = render(tokenizer, ("a", "b"), template)
    one, two = tokenizer(texts, add_special_tokens=template == "plain").input_ids
    pairs = zip(one, two, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), 0)


def fit(prompt: tuple[int, ...], response: tuple[int, ...], max_tokens: int, head: int) -> TokenRow:
    """Cut a row to the limit: the prompt behind its head, then the response's end.

    Parameters
    ----------
    prompt, response : tuple of int
        Whole.
    max_tokens : int
        See `encode`.
    head : int
        Tokens that the template begins with; see `template_head`.
    """
    if len(prompt) + len(response) <= max_tokens:
        return TokenRow(prompt, response)
    least = min(len(prompt), max(1, int(_PROMPT_SHARE * max_tokens)))
    response = response[: max_tokens - least]
    room = max_tokens - len(response)
    head = head if 2 * head <= room else 0  # the prompt itself matters more than its frame
    return TokenRow(prompt[:head] + prompt[len(prompt) - room + head :], response, truncated=True)


def batches(
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    token_budget: int = 1024,
    prompts_only: bool = False,
    room: int = 0,
) -> Iterator[Batch]:
    """Group rows of similar length into batches of at most `token_budget` padded tokens.

    Parameters
    ----------
    rows : sequence of TokenRow
        Any order; batches come longest first, so that memory use peaks at once.
    pad_id : int
        Padding token.
    token_budget : int
        Padded tokens per batch (rows × longest row); a longer single row makes a batch of its own.
    prompts_only : bool
        Leave the responses out, for generation; they still count in the budget.
    room : int
        Tokens to be generated per row, counted in the budget where they exceed the response.

    Yields
    ------
    Batch
    """

    def length(index: int) -> int:
        return len(rows[index].prompt) if prompts_only else len(rows[index])

    order = sorted(range(len(rows)), key=length, reverse=True)
    start = 0
    while start < len(order):
        chosen = order[start : start + _fitting(rows, order[start:], token_budget, room)]
        yield collate(rows, chosen, pad_id, prompts_only)
        start += len(chosen)


def _fitting(rows: Sequence[TokenRow], order: Sequence[int], token_budget: int, room: int) -> int:
    """Return how many of the next rows fit the budget, padded; at least one."""
    prompt = response = 0
    for count, index in enumerate(order):
        prompt = max(prompt, len(rows[index].prompt))
        response = max(response, room, len(rows[index].response))
        if count and (count + 1) * (prompt + response) > token_budget:
            return count
    return len(order)


def collate(
    rows: Sequence[TokenRow], chosen: Sequence[int], pad_id: int, prompts_only: bool = False
) -> Batch:
    """Pad the chosen rows on the left into one batch; see `batches`."""
    sequences = [
        rows[i].prompt if prompts_only else rows[i].prompt + rows[i].response for i in chosen
    ]
    width = max(len(s) for s in sequences)
    longest = 0 if prompts_only else max(len(rows[i].response) for i in chosen)
    ids = torch.full((len(chosen), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(chosen), longest + 1), IGNORED)
    for place, (index, sequence) in enumerate(zip(chosen, sequences, strict=True)):
        ids[place, width - len(sequence) :] = torch.tensor(sequence)
        mask[place, width - len(sequence) :] = 1
        if not prompts_only:
            response = rows[index].response
            # The token at column t is predicted at t - 1, hence the shift by one to the left.
            labels[place, longest - len(response) : longest] = torch.tensor(response)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return Batch(ids, mask, positions, labels, tuple(chosen))
