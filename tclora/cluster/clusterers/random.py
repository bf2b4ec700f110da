"""Random groups of even size: the control that tells what clustering adds."""

from functools import partial

import numpy as np

from tclora.cluster.centroids import Labels
from tclora.cluster.clusterers.limits import check_k
from tclora.cluster.registry import Groups, Rows, register
from tclora.config import ClusterConfig


def _needs_a_number(config: ClusterConfig) -> list[str]:
    if config.k == "auto":
        return ["cluster.k must be a number with cluster.method: random, got 'auto'"]
    return []


@register("random", check=_needs_a_number)
def random(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """Random groups of even size, a control; held-out rows go to random ones too.

    Raises
    ------
    DataError
        If there are fewer rows than clusters.
    """
    k = check_k(len(rows), config.k)
    labels = np.random.default_rng(seed).permutation(np.arange(len(rows)) % k)
    return Groups(labels, held_out=partial(_at_random, seed=seed))


def _at_random(rows: Rows, nearest: Labels, training: Labels, *, seed: int) -> Labels:
    groups = np.random.default_rng(seed + 1).permutation(np.arange(len(rows)))
    return np.asarray(groups % (training.max() + 1))
