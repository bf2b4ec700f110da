"""Rows behind each other in one sequence, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tclora.model.tokens import TokenRow


@dataclass(frozen=True)
class Pack:
    """Rows of N tokens in all, S of them supervised.

    Attributes
    ----------
    input_ids, position_ids : Tensor
        (1, N) int64; positions start again with every row.
    lengths : tuple of int
        Tokens of every row.
    places : Tensor
        (S,) int64, ascending: positions that predict a response token.
    labels : Tensor
        (S,) int64: these tokens.
    owners : Tensor
        (S,) int64: which row of the pack each belongs to.
    rows : tuple of int
        Indices of the rows in the sequence the pack was made from.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    places: Tensor
    labels: Tensor
    owners: Tensor
    rows: tuple[int, ...]

    @cached_property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)


def packs(
    rows: Sequence[TokenRow], *, token_budget: int, order: Sequence[int] | None = None
) -> Iterator[Pack]:
    """Cut rows into packs of at most `token_budget` tokens.

    Parameters
    ----------
    rows : sequence of TokenRow
        With prompts of at least one token: the first token of a row is predicted by none.
    token_budget : int
        Tokens per pack; a longer single row makes a pack of its own.
    order : sequence of int, optional
        Indices of the rows in the order to take; longest first by default.

    Yields
    ------
    Pack
    """
    order = order or sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    chosen: list[int] = []
    for index in order:
        if chosen and sum(len(rows[i]) for i in (*chosen, index)) > token_budget:
            yield pack(rows, chosen)
            chosen = []
        chosen.append(index)
    if chosen:
        yield pack(rows, chosen)


def pack(rows: Sequence[TokenRow], chosen: Sequence[int]) -> Pack:
    """Put the chosen rows behind each other; see `packs`."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for index in chosen:
        row = rows[index]
        first = len(ids) + len(row.prompt)
        # The token at position t is predicted at t - 1.
        places += range(first - 1, first - 1 + len(row.response))
        labels += row.response
        ids += row.prompt + row.response
        positions += range(len(row))
    counts = torch.tensor([len(rows[index].response) for index in chosen])
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        lengths=tuple(len(rows[index]) for index in chosen),
        places=torch.tensor(places),
        labels=torch.tensor(labels),
        owners=torch.repeat_interleave(counts),
        rows=tuple(chosen),
    )
