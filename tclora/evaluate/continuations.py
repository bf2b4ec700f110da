"""Log-likelihoods of several continuations of one prompt, the prompt computed once.

A batch of prompts is run with a key-value cache, together with what all continuations of a prompt
begin with. Its last logits predict the first token that differs, so that options of one token are
done. The rest of the continuations is run on copies of the cache's rows.

Symbols: n rows in a batch, W columns of prompts, m continuations, L columns of their tokens, V
tokens of the vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tclora.errors import ModelError
from tclora.evaluate.context import RowContext, plain
from tclora.model.loss import logits_of
from tclora.model.tokens import Batch, TokenRow, batches

Tokens = tuple[int, ...]
_FULL, _FEW = 0.7, 16  # share of the longest, and number of leaves, that make a pass worth it
_COPIES = 4  # tokens of copied cache per token of the budget; a copy costs memory, no computation


@dataclass(frozen=True)
class Fork:
    """A prompt and what may follow it, in tokens.

    Attributes
    ----------
    prompt : tuple of int
        At least one token.
    continuations : tuple of tuple of int
        None of them empty.
    """

    prompt: Tokens
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True)
class Likelihood:
    """How a model sees one continuation.

    Attributes
    ----------
    logprobs : tuple of float
        Log-probability of each of its tokens (nats).
    greedy : bool
        Whether each of them is the most probable one.
    """

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """Log-likelihood of the whole (nats)."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class _Tree:
    """A fork as it is computed: a root for all, and branches of which none begins another."""

    root: Tokens  # prompt and what all continuations share
    shared: int  # tokens of the root that are part of every continuation
    branches: tuple[Tokens, ...]


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    forks: Sequence[Fork],
    *,
    pad_id: int,
    token_budget: int = 2048,
    context: RowContext = plain,
) -> list[list[Likelihood]]:
    """Compute the likelihood of every continuation of every prompt.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        In evaluation mode.
    forks : sequence of Fork
        In any order.
    pad_id : int
        Padding token.
    token_budget : int
        Padded tokens per forward pass.
    context : callable
        Takes the numbers of a batch's forks, some several times over, and gives a context to
        compute the batch in.

    Returns
    -------
    list of list of Likelihood
        In the order of forks and their continuations.

    Raises
    ------
    ModelError
        If the model's cache cannot be copied by row, as that of state-space layers.
    """
    trees = [_tree(fork) for fork in forks]
    found: dict[int, list[Likelihood]] = {}
    # A root's branches stand for its response: the budget counts them.
    rows = [TokenRow(tree.root, sum(tree.branches, ())) for tree in trees]
    for batch in batches(rows, pad_id=pad_id, token_budget=token_budget, prompts_only=True):
        walk = _Walk(model, [trees[i] for i in batch.rows], batch, context, token_budget)
        for place, index in enumerate(batch.rows):
            found[index] = [walk.read(place, tokens) for tokens in forks[index].continuations]
    return [found[i] for i in range(len(forks))]


def _tree(fork: Fork) -> _Tree:
    whole = sorted(set(fork.continuations))
    leaves = [
        tokens
        for tokens, after in zip(whole, [*whole[1:], ()], strict=True)
        if after[: len(tokens)] != tokens  # sorted: what begins another stands right before it
    ]
    # What the first and the last in order share, all share.
    same = [a == b for a, b in zip(leaves[0][:-1], leaves[-1][:-1], strict=False)]
    shared = same.index(False) if False in same else len(same)
    root = fork.prompt + leaves[0][:shared]
    return _Tree(root, shared, tuple(tokens[shared:] for tokens in leaves))


class _Walk:
    """The likelihoods of one batch, from the roots to the leaves."""

    def __init__(
        self,
        model: PreTrainedModel,
        trees: Sequence[_Tree],
        batch: Batch,
        context: RowContext,
        token_budget: int,
    ) -> None:
        self._trees = trees
        device = model.device
        mask = batch.attention_mask.to(device)
        kept = max(tree.shared for tree in trees) + 1
        with context(batch.rows), logits_of(model, Tensor.contiguous):
            output = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=mask,
                position_ids=batch.position_ids.to(device),
                logits_to_keep=kept,
                use_cache=True,
            )
        self._shared = [self._read_root(tree, output.logits[i]) for i, tree in enumerate(trees)]
        first = output.logits[:, -1].float().log_softmax(-1)  # (n, V)
        best = first.argmax(-1).tolist()
        self._leaves = {
            (i, tokens): [(float(first[i, tokens[0]]), best[i] == tokens[0])]
            for i, tree in enumerate(trees)
            for tokens in tree.branches
        }
        longer = [leaf for leaf in self._leaves if len(leaf[1]) > 1]
        for chosen in _chunks(longer, mask.shape[1], token_budget):
            places = [place for place, _ in chosen]
            cache = _take(output.past_key_values, torch.tensor(places, device=device))
            with context([batch.rows[place] for place in places]):
                scored = _extend(model, cache, mask[places], [tokens for _, tokens in chosen])
            for leaf, values in zip(chosen, scored, strict=True):
                self._leaves[leaf] += values

    def read(self, place: int, continuation: Tokens) -> Likelihood:
        """Return the likelihood of one continuation of the fork at a place of the batch."""
        tree = self._trees[place]
        rest = continuation[tree.shared :]
        leaf = next(t for t in tree.branches if t[: len(rest)] == rest)
        values = (self._shared[place] + self._leaves[place, leaf])[: len(continuation)]
        return Likelihood(tuple(value for value, _ in values), all(top for _, top in values))

    @staticmethod
    def _read_root(tree: _Tree, logits: Tensor) -> list[tuple[float, bool]]:
        if not tree.shared:
            return []
        # The last column predicts what follows the root, those before it the root's own tokens.
        return _pick(logits[-1 - tree.shared : -1], torch.tensor(tree.root[-tree.shared :]))


def _extend(
    model: PreTrainedModel,
    cache: Any,  # noqa: ANN401
    mask: Tensor,
    branches: Sequence[Tokens],
) -> list[list[tuple[float, bool]]]:
    """Run branches on the cache of their roots; return the values of their tokens but the first."""
    longest = max(map(len, branches)) - 1
    fed = torch.zeros((len(branches), longest), dtype=torch.long)
    for row, tokens in enumerate(branches):
        fed[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
    device = mask.device
    lengths = torch.tensor([len(tokens) - 1 for tokens in branches])
    # What pads a branch on the right is never attended to by the tokens before it.
    real = (torch.arange(longest) < lengths[:, None]).to(device)
    with logits_of(model, lambda hidden: hidden[real][None]):
        logits = model(
            input_ids=fed.to(device),
            attention_mask=torch.cat([mask, mask.new_ones(fed.shape)], dim=1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(longest, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]  # (tokens of all branches but the first of each, V)
    parts = logits.split(lengths.tolist())
    return [_pick(part, torch.tensor(t[1:])) for part, t in zip(parts, branches, strict=True)]


def _pick(logits: Tensor, tokens: Tensor) -> list[tuple[float, bool]]:
    """Return the log-probability of each token, and whether it is the most probable: (T, V)."""
    tokens = tokens.to(logits.device)
    values = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return list(zip(values.tolist(), (logits.argmax(-1) == tokens).tolist(), strict=True))


def _chunks(
    leaves: Sequence[tuple[int, Tokens]], width: int, token_budget: int
) -> Iterator[list[tuple[int, Tokens]]]:
    """Divide leaves, longest first, so that a pass and its copies of the cache stay in bounds.

    Where there are enough of them, leaves much shorter than the longest wait for the next pass:
    they would be padding for the most part.
    """
    order = sorted(leaves, key=lambda leaf: -len(leaf[1]))
    start = 0
    while start < len(order):
        longest = len(order[start][1])
        room = max(1, min(token_budget // longest, _COPIES * token_budget // (width + longest)))
        full = [leaf for leaf in order[start : start + room] if len(leaf[1]) > _FULL * longest]
        count = max(len(full), min(room, _FEW))
        yield order[start : start + count]
        start += count


def _take(cache: Any, rows: Tensor) -> Any:  # noqa: ANN401
    """Return a cache of some rows of another, which stays as it is."""
    if not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        raise ModelError(
            "choices need a base model whose cache can be copied by row, got layers of "
            f"{type(cache.layers[0]).__name__}; leave the choices out of the rows"
        )
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(rows)
    return taken
