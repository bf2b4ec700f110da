"""Where prompts go: what every router returns, and what it does to a model's gates.

Symbols: N prompts, K clusters.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tclora.route.gating import Gating

Array = NDArray[np.float32]
_TOKEN_COLUMNS = ("token_temperature", "token_top_k")


@dataclass(frozen=True)
class TokenRule:
    """How tokens are gated each by itself; see `Gating.applied_per_token`.

    Attributes
    ----------
    temperature : float
        Temperature of the softmax over clusters.
    top_k : int or None
        Clusters mixed per token; all if None.
    """

    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class Routing:
    """Where prompts go.

    Attributes
    ----------
    weights : ndarray of float32, shape (N, K)
        Not negative, rows of sum 1.
    known : ndarray of bool, shape (N,)
        Whether the prompt is near enough to its nearest cluster; the router abstains from others.
    similarity : ndarray of float32, shape (N,)
        How near the prompt is to its nearest cluster, such as the cosine to its centroid.
    probabilities : ndarray of float32, shape (N, K), optional
        How likely the prompt belongs to each cluster, rows of sum 1; the router's quality is
        measured on them. The weights by default.
    by_token : TokenRule, optional
        Where given, every token chooses its clusters itself, whatever the weights.
    belonging : ndarray of float32, shape (N,), optional
        Share of the clusters' gates in the prompt's own (0–1), the fallback gate being the rest; 1
        for known prompts and 0 for others by default.
    """

    weights: Array
    known: NDArray[np.bool_]
    similarity: Array
    probabilities: Array | None = None
    by_token: TokenRule | None = None
    belonging: Array | None = None

    @property
    def shares(self) -> Array:
        """Belonging of every prompt, shape (N,)."""
        return self.known.astype(np.float32) if self.belonging is None else self.belonging

    @property
    def coverage(self) -> float:
        """Share of the prompts that are routed (0–1)."""
        return float(self.known.mean())

    def context(self, gating: "Gating") -> AbstractContextManager[None]:
        """Gate a model by this routing while the context lasts.

        A batch must hold the routing's prompts in their order, or a multiple of them (beams); one
        routed prompt alone serves every row.
        """
        belonging = torch.from_numpy(self.shares)
        if self.by_token:
            rule = self.by_token
            return gating.applied_per_token(
                temperature=rule.temperature, top_k=rule.top_k, belonging=belonging
            )
        return gating.applied(torch.from_numpy(self.weights), belonging)

    def take(self, rows: Sequence[int]) -> "Routing":
        """Return the routing of some of the prompts, by their numbers."""
        chosen = list(rows)
        return Routing(
            self.weights[chosen],
            self.known[chosen],
            self.similarity[chosen],
            None if self.probabilities is None else self.probabilities[chosen],
            self.by_token,
            None if self.belonging is None else self.belonging[chosen],
        )

    def table(self, names: Sequence[str]) -> pd.DataFrame:
        """Return one row per prompt; `routing_from_table` reads it back.

        Parameters
        ----------
        names : sequence of K str
            Adapter names of the clusters.

        Returns
        -------
        DataFrame
            nearest (most probable cluster), known, similarity, confidence (its probability),
            belonging, one column of weights per name, and the rule of `by_token` where there is
            one.
        """
        likely = self.weights if self.probabilities is None else self.probabilities
        table = pd.DataFrame(
            {
                "nearest": likely.argmax(axis=1),
                "known": self.known,
                "similarity": self.similarity,
                "confidence": likely.max(axis=1, initial=0.0),
                "belonging": self.shares,
            }
        )
        weights = pd.DataFrame(self.weights, columns=list(names))
        if self.by_token:
            temperature, top_k = _TOKEN_COLUMNS
            weights[temperature] = self.by_token.temperature
            weights[top_k] = pd.array([self.by_token.top_k] * len(weights), dtype="Int64")
        return pd.concat([table, weights], axis=1)


def together(routings: Sequence[Routing]) -> Routing:
    """Put the routings of one router behind each other, for a batch.

    Raises
    ------
    ValueError
        If there is none, or some gate by token and others by prompt.
    """
    rules = {routing.by_token for routing in routings}
    if len(rules) != 1:
        raise ValueError(f"routings must be at least one and of one token rule, got {rules}")
    return Routing(
        np.concatenate([routing.weights for routing in routings]),
        np.concatenate([routing.known for routing in routings]),
        np.concatenate([routing.similarity for routing in routings]),
        by_token=rules.pop(),
        belonging=np.concatenate([routing.shares for routing in routings]),
    )


def routing_from_table(table: pd.DataFrame, names: Sequence[str]) -> Routing:
    """Return the routing that `Routing.table` wrote, such as that of ``routing.parquet``.

    Parameters
    ----------
    table : DataFrame
        One row per prompt.
    names : sequence of K str
        Adapter names of the clusters, ``RoutedLibrary.gated.names``.

    Raises
    ------
    ValueError
        If a column is missing.
    """
    if missing := sorted({*names, "known", "similarity"} - set(table.columns)):
        raise ValueError(
            f"table must have a column per cluster, known, similarity, lacks {missing}"
        )
    return Routing(
        table[list(names)].to_numpy("float32", copy=True),
        table["known"].to_numpy("bool", copy=True),
        table["similarity"].to_numpy("float32", copy=True),
        by_token=_token_rule(table),
        belonging=_belonging(table),
    )


def _belonging(table: pd.DataFrame) -> Array | None:
    """Return the column, None for tables of version 0.1.0, which lack it."""
    return table["belonging"].to_numpy("float32", copy=True) if "belonging" in table else None


def _token_rule(table: pd.DataFrame) -> TokenRule | None:
    temperature, top_k = _TOKEN_COLUMNS
    if temperature not in table or table.empty:
        return None
    several = table[top_k].iloc[0]
    return TokenRule(float(table[temperature].iloc[0]), None if pd.isna(several) else int(several))
