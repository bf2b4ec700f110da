"""Log-likelihoods of several continuations of one prompt, all from one forward pass.

A prompt, what all of its continuations begin with, and then the rest of each continuation stand
behind each other in one row. Positions and the attention mask make a tree of it: a continuation
sees the prompt and itself, never its siblings. The last token of a continuation is predicted, not
fed, so that options of one token cost nothing beside the prompt.

Symbols: n rows in a batch, T their padded length, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tclora.evaluate.context import RowContext, plain
from tclora.model.loss import logits_of
from tclora.model.tokens import Batch, TokenRow, batches

Tokens = tuple[int, ...]
_MASKED = ("sdpa", "eager")  # implementations of attention that take a mask as it is


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

    @property
    def fed(self) -> Tokens:
        """The tokens of the row: the root, and every branch without its last token."""
        return self.root + tuple(token for branch in self.branches for token in branch[:-1])

    def positions(self) -> Tensor:
        """Return the position of every token of the row, (fed,)."""
        start = len(self.root)
        parts = [range(start), *(range(start, start + len(b) - 1) for b in self.branches)]
        return torch.tensor([place for part in parts for place in part])

    def sees(self) -> Tensor:
        """Return which token of the row sees which, (fed, fed): its own branch and the root."""
        part = [0] * len(self.root)
        for number, branch in enumerate(self.branches, start=1):
            part += [number] * (len(branch) - 1)
        parts = torch.tensor(part)
        related = (parts[:, None] == parts) | (parts == 0)
        return related.tril()

    def path(self, continuation: Tokens) -> list[int]:
        """Return where the tokens of a continuation are predicted, counted from `first`."""
        rest, end = continuation[self.shared :], self.shared
        places = list(range(min(self.shared, len(continuation))))
        if not rest:
            return places
        for branch in self.branches:
            if branch[: len(rest)] == rest:
                return [*places, self.shared, *range(end + 1, end + len(rest))]
            end += len(branch) - 1
        raise ValueError("continuation must be one of the tree's")

    @property
    def first(self) -> int:
        """The first token of the row whose prediction counts."""
        return len(self.root) - 1 - self.shared

    def leaves(self) -> list[Tokens]:
        """Return the longest continuations, whole."""
        common = self.root[len(self.root) - self.shared :]
        return [common + branch for branch in self.branches]


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
        In evaluation mode. One whose attention takes no mask of ours, or looks back a window that
        is shorter than a row, computes every continuation in a row of its own.
    forks : sequence of Fork
        In any order.
    pad_id : int
        Padding token.
    token_budget : int
        Padded tokens per forward pass.
    context : callable
        Takes the numbers of a batch's forks and gives a context to compute the batch in.

    Returns
    -------
    list of list of Likelihood
        In the order of forks and their continuations.
    """
    trees = [(number, _tree(fork.prompt, fork.continuations)) for number, fork in enumerate(forks)]
    as_trees = _takes_trees(model, max((len(tree.fed) for _, tree in trees), default=0))
    if not as_trees:
        trees = [
            (number, _tree(fork.prompt, (tokens,)))
            for number, fork in enumerate(forks)
            for tokens in sorted(set(fork.continuations))
        ]
    rows = [TokenRow(tree.fed, ()) for _, tree in trees]
    found: dict[tuple[int, Tokens], Likelihood] = {}
    for batch in batches(rows, pad_id=pad_id, token_budget=token_budget, prompts_only=True):
        chosen = [trees[i] for i in batch.rows]
        with context([number for number, _ in chosen]):
            logits = _logits(model, batch, [tree for _, tree in chosen], as_trees)
        for (number, tree), part in zip(chosen, logits, strict=True):
            read = _read(tree, part, forks[number].continuations)
            found |= {(number, tokens): value for tokens, value in read.items()}
    return [
        [found[number, tokens] for tokens in fork.continuations]
        for number, fork in enumerate(forks)
    ]


def _tree(prompt: Tokens, continuations: Sequence[Tokens]) -> _Tree:
    whole = sorted(set(continuations))
    leaves = [
        tokens
        for tokens, after in zip(whole, [*whole[1:], ()], strict=True)
        if after[: len(tokens)] != tokens  # sorted: what begins another stands right before it
    ]
    # What the first and the last in order share, all share.
    same = [a == b for a, b in zip(leaves[0][:-1], leaves[-1][:-1], strict=False)]
    shared = same.index(False) if False in same else len(same)
    root = prompt + leaves[0][:shared]
    return _Tree(root, shared, tuple(tokens[shared:] for tokens in leaves))


def _takes_trees(model: PreTrainedModel, longest: int) -> bool:
    """Whether every layer of a model attends as a mask says, over the length of a row."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or longest
    attends = kinds <= {"full_attention", "sliding_attention"}
    return attends and longest <= window and config._attn_implementation in _MASKED


def _logits(
    model: PreTrainedModel, batch: Batch, trees: Sequence[_Tree], as_trees: bool
) -> Sequence[Tensor]:
    """Run left-padded rows; return each one's logits from its `first` token on, (·, V)."""
    width, device = batch.input_ids.shape[1], model.device
    positions = batch.position_ids.clone()
    kept = torch.zeros_like(positions, dtype=torch.bool)
    for row, tree in enumerate(trees):
        start = width - len(tree.fed)
        positions[row, start:] = tree.positions()
        kept[row, start + tree.first :] = True
    chosen = kept.to(device)
    with logits_of(model, lambda hidden: hidden[chosen][None]):
        logits: Tensor = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=_mask(trees, width, model)
            if as_trees
            else batch.attention_mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).logits[0]  # (kept of all rows, V)
    return torch.split(logits, kept.sum(1).tolist())


def _mask(trees: Sequence[_Tree], width: int, model: PreTrainedModel) -> Tensor:
    """Return what is added to the scores of attention, (n, 1, T, T); padding sees itself alone."""
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        start = width - len(tree.fed)
        sees[row, start:, start:] = tree.sees()
    blocked = ~sees[:, None].to(model.device)
    mask = torch.zeros(blocked.shape, dtype=model.dtype, device=model.device)
    return mask.masked_fill_(blocked, torch.finfo(model.dtype).min)


def _read(tree: _Tree, logits: Tensor, continuations: Sequence[Tokens]) -> dict[Tokens, Likelihood]:
    """Return the likelihoods of those continuations that a row has, from its logits."""
    logprobs = logits.float().log_softmax(-1)
    best = logits.argmax(-1)
    found = {}
    for tokens in set(continuations):
        if not any(leaf[: len(tokens)] == tokens for leaf in tree.leaves()):
            continue
        places = torch.tensor(tree.path(tokens), device=logits.device)
        wanted = torch.tensor(tokens, device=logits.device)
        values = logprobs[places, wanted].tolist()
        found[tokens] = Likelihood(tuple(values), bool((best[places] == wanted).all()))
    return found
