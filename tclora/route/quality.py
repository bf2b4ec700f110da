"""How well the router does on held-out prompts: accuracy, calibration, coverage.

Symbols: N prompts, K clusters.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.cluster.centroids import NOISE

_BINS = 10


def true_clusters(rows: pd.DataFrame) -> pd.Series:
    """Return the cluster that the training rows of each row's task went to, most of them.

    Parameters
    ----------
    rows : DataFrame
        Columns task, split, cluster, with training and held-out rows.

    Returns
    -------
    Series of Int64
        Missing where the task has no label or was not trained on.
    """
    training = rows[(rows["split"] == "train") & (rows["cluster"] != NOISE)]
    counts = training.dropna(subset=["task"]).groupby(["task", "cluster"]).size()
    largest = counts.groupby(level="task").idxmax()
    return rows["task"].map(dict(largest.tolist())).astype("Int64")


def reliability(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> pd.DataFrame:
    """Return the calibration curve of a router.

    Parameters
    ----------
    confidence : ndarray, shape (N,)
        Probability given to the nearest cluster (0–1).
    correct : ndarray of bool, shape (N,)
        Whether it is the true one.

    Returns
    -------
    DataFrame
        One row per occupied bin of equal width: low, n, confidence (mean), accuracy.
    """
    bins = np.minimum((np.asarray(confidence) * _BINS).astype(int), _BINS - 1)
    table = pd.DataFrame({"low": bins / _BINS, "confidence": confidence, "accuracy": correct})
    grouped = table.groupby("low").agg(
        n=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    return grouped.reset_index()


def router_figures(routing: pd.DataFrame) -> Mapping[str, float]:
    """Summarise the routing of held-out prompts.

    Parameters
    ----------
    routing : DataFrame
        Columns split, nearest, true (missing where unknown), known, confidence.

    Returns
    -------
    Mapping
        Coverage per split (share of prompts that are routed) and, over in-domain prompts whose true
        cluster is known, accuracy and expected calibration error (all 0–1).

    References
    ----------
    Guo et al. (2017), "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    figures = {
        f"coverage_{split}": float(part["known"].mean())
        for split, part in routing.groupby("split", sort=True)
    }
    curve = calibration_curve(routing)
    if len(curve):
        share = curve["n"] / curve["n"].sum()
        gap = (curve["confidence"] - curve["accuracy"]).abs()
        figures["accuracy"] = float((share * curve["accuracy"]).sum())
        figures["calibration_error"] = float((share * gap).sum())
    return figures


def calibration_curve(routing: pd.DataFrame) -> pd.DataFrame:
    """Return the `reliability` of in-domain prompts whose true cluster is known.

    Parameters
    ----------
    routing : DataFrame
        As in `router_figures`.
    """
    judged = routing[(routing["split"] == "test") & routing["true"].notna()]
    correct = (judged["nearest"] == judged["true"]).to_numpy(bool)
    return reliability(judged["confidence"].to_numpy(), correct)
