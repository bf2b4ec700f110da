"""Clusters by task label: the control that knows what clustering has to find."""

from functools import partial

import numpy as np
import pandas as pd

from tclora.cluster.centroids import Labels
from tclora.cluster.registry import Groups, Rows, register
from tclora.config import ClusterConfig
from tclora.errors import DataError


@register("task", counts=False)
def task(rows: Rows, config: ClusterConfig, seed: int) -> Groups:
    """One cluster per task label, a control; held-out rows of a trained task go to its cluster.

    Raises
    ------
    DataError
        If a training row has no label.
    """
    if missing := sum(label is None or pd.isna(label) for label in rows.tasks):
        raise DataError(
            f"cluster.method: task needs a task label on every training row, {missing} lack one; "
            "name the column in data.columns or use kmeans"
        )
    names = np.asarray(rows.tasks, dtype=object).astype(str)
    labels = np.unique(names, return_inverse=True)[1]
    return Groups(labels, held_out=partial(_by_task, trained=rows))


def _by_task(rows: Rows, nearest: Labels, training: Labels, *, trained: Rows) -> Labels:
    cluster_of = dict(zip(trained.tasks, training.tolist(), strict=True))
    found = [cluster_of.get(t, n) for t, n in zip(rows.tasks, nearest.tolist(), strict=True)]
    return np.array(found, dtype=np.int64)
