"""Where the router abstains, chosen by the base model's loss on rows unlike the training rows.

Two kinds of probes are measured at several shares of belonging κ, each with the nearest cluster's
gate against the fallback's: rows of a cluster in other wordings, which should be routed, and rows
of a cluster that is left out of the router and of the fallback, which belong nowhere. Of the rules
that lose measurably no more than the best one, that which abstains least is taken: a prompt is
turned away where its routed answer is shown to be worse, not where nothing is known.

Symbols: K clusters, n probes, D embedding width, κ belonging.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit

from tclora.cluster.centroids import Labels, centroids
from tclora.cluster.vectors import Embeddings
from tclora.data.rewording import rewordings
from tclora.model.attach import attached
from tclora.model.base import LoadedBase
from tclora.model.reading import head_among, reading
from tclora.route.equations import Fallback
from tclora.route.gates import GateFit
from tclora.route.nearness import Abstention, NearnessScale, held_out_similarity
from tclora.tune.fallback import unit_adapter

SHARES = (0.0, 0.5, 1.0)  # κ at which every probe is measured; a parabola between
OWN, REWORDED, FOREIGN = "own", "reworded", "foreign"
PLACES = tuple(np.linspace(-0.25, 1.0, 51).tolist())
WIDTHS = (0.02, 0.05, 0.1)
_STEP = float(np.finfo(np.float32).tiny)  # the width of a step
_SIGMAS = 1.96  # a rule is worse if its loss is by so many standard errors, at a level of 95 %

Array = NDArray[np.float64]
Embed = Callable[[Sequence[str]], Embeddings]


@dataclass(frozen=True)
class AbstentionSearch:
    """The outcome of a search.

    Attributes
    ----------
    rule : Abstention
        The rule.
    loss, never, always : float
        Mean loss (nats per token) of the probes under the rule, without abstention and without
        routing; rows of their cluster, half of them reworded, count as much as foreign ones.
    """

    rule: Abstention
    loss: float
    never: float
    always: float


def make_probes(
    rows: Mapping[str, pd.DataFrame], vectors: Embeddings, labels: Labels, embed: Embed, seed: int
) -> pd.DataFrame:
    """Make the probes of some rows of every cluster.

    Parameters
    ----------
    rows : Mapping[str, DataFrame]
        Adapter name → rows of its cluster (columns prompt, response), in the clusters' order.
    vectors : ndarray of float32, shape (N, D)
        Unit-norm embeddings of the training prompts.
    labels : ndarray of int64, shape (N,)
        Their clusters, 0 … K-1.
    embed : callable
        Embeds prompts, as `vectors` were.
    seed : int
        Seed of the folds of the scale of nearness.

    Returns
    -------
    DataFrame
        Columns prompt, response, kind ("own", "reworded" or "foreign"), cluster, nearest (the
        nearest cluster, of the others for foreign ones), nearness (to it).
    """
    frame = pd.concat([_wordings(part, k) for k, part in enumerate(rows.values())])
    centres = centroids(vectors, labels)
    scale = NearnessScale.of(held_out_similarity(vectors, labels, centres, seed), labels)
    similarity = embed(frame["prompt"].tolist()) @ centres.T  # (n, K)
    foreign = (frame["kind"] == FOREIGN).to_numpy()
    similarity[foreign, frame.loc[foreign, "cluster"]] = -np.inf
    nearest = similarity.argmax(axis=1)
    nearness = scale.nearness(similarity)[np.arange(len(frame)), nearest]
    return frame.assign(nearest=nearest, nearness=nearness)


def _wordings(rows: pd.DataFrame, cluster: int) -> pd.DataFrame:
    """Return rows of a cluster as they are, reworded, and as rows of no cluster."""
    made = pd.Series(rewordings(rows["prompt"].tolist()), index=rows.index, dtype=object)
    again = rows.assign(prompt=made).explode("prompt")
    kinds = {OWN: rows, REWORDED: again.dropna(subset=["prompt"]), FOREIGN: rows}
    parts = [part.assign(kind=kind) for kind, part in kinds.items()]
    return pd.concat(parts, ignore_index=True).assign(cluster=cluster)


@torch.no_grad()
def measure_probes(
    loaded: LoadedBase, fit: GateFit, rule: Fallback, probes: pd.DataFrame, token_budget: int
) -> Array:
    """Measure every probe between fallback gate and nearest cluster's gate.

    Parameters
    ----------
    loaded : LoadedBase
        The base model, without adapters.
    fit : GateFit
        The equations of the gates.
    rule : Fallback
        How the fallback is made; for a foreign probe without its own cluster.
    probes : DataFrame
        As of `make_probes`, with an index of 0 … n-1.
    token_budget : int
        Positions per forward pass.

    Returns
    -------
    ndarray, shape (n, 3)
        Response NLL (nats per token) at the shares `SHARES` of belonging.
    """
    components, own = unit_adapter(fit.unit), fit.gated().gates
    losses = np.empty((len(probes), len(SHARES)))
    rows = loaded.encode(probes)
    read = reading(
        loaded.model,
        max(map(len, rows)),
        head_trained=head_among(loaded.model, components.modules),
    )
    left_out = probes["cluster"].where(probes["kind"] == FOREIGN, -1)
    with read.ready():
        for k, near in sorted(set(zip(left_out.tolist(), probes["nearest"].tolist(), strict=True))):
            chosen = np.flatnonzero((left_out == k) & (probes["nearest"] == near))
            parts = list(read.parts([rows[index] for index in chosen], token_budget))
            fallback = fit.fallback(rule, without=None if k < 0 else k)
            for column, share in enumerate(SHARES):
                gates = {m: torch.lerp(fallback[m], own[m][near], share) for m in own}
                with attached(loaded.model, components, gates):
                    for part in parts:
                        found = read.losses(part).cpu().numpy()
                        losses[chosen[list(part.rows)], column] = found
    per_token: Array = losses / np.array([[len(row.response)] for row in rows])
    return per_token


def choose_abstention(
    probes: pd.DataFrame,
    losses: Array,
    *,
    places: Sequence[float] = PLACES,
    widths: Sequence[float] = WIDTHS,
) -> AbstentionSearch:
    """Choose where the router abstains.

    Parameters
    ----------
    probes : DataFrame
        Columns kind and nearness.
    losses : ndarray, shape (n, 3)
        Their losses at the shares `SHARES` of belonging.
    places, widths : sequence of float
        The candidates (nearness).

    Returns
    -------
    AbstentionSearch
        Of the rules whose loss is not above the least one's by more than 1.96 standard errors of
        their difference, paired probe by probe, that of the lowest place; at equal places that of
        the least loss.
    """
    kinds = probes["kind"]
    per_kind = kinds.groupby(kinds != FOREIGN).transform("nunique") * kinds.map(
        kinds.value_counts()
    )
    weights = (0.5 / per_kind).to_numpy(float)  # rows that belong count as much as foreign ones
    nearness = probes["nearness"].to_numpy(float)
    tried = {
        Abstention(at, width): _between(losses, expit((nearness - at) / max(width, _STEP)))
        for at in places
        for width in widths
    }
    means = {rule: float(weights @ found) for rule, found in tried.items()}
    least = min(means, key=means.__getitem__)
    good = [rule for rule, found in tried.items() if not _worse(found, tried[least], weights)]
    rule = min(good, key=lambda rule: (rule.at, means[rule]))
    never, always = float(weights @ losses[:, -1]), float(weights @ losses[:, 0])
    return AbstentionSearch(rule, means[rule], never, always)


def _worse(losses: Array, others: Array, weights: Array) -> bool:
    """Tell whether one weighted mean loss is measurably above another, probe by probe."""
    differences = losses - others
    mean = float(weights @ differences)
    error = float(np.sqrt(weights**2 @ (differences - mean) ** 2))
    return mean > _SIGMAS * error


def _between(losses: Array, shares: Array) -> Array:
    """Return each row's loss at its share, on a parabola through those measured, shape (n,)."""
    none, half, whole = losses.T
    curved = 2 * none - 4 * half + 2 * whole
    found: Array = none + shares * (whole - none - curved + shares * curved)
    return found
