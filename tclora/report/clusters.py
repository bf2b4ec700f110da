"""What the clusters hold: quality, tasks per cluster, and the prompts nearest to each centroid."""

from dataclasses import dataclass

import pandas as pd

from tclora.library.contents import Contents
from tclora.library.records import Clustering
from tclora.report.notation import number, shorten
from tclora.report.overview import Fact

_N_PROMPTS = 3
_PROMPT_LENGTH = 110
_SPLITS = ("train", "ood", "composition")
_NO_TASK = "(no label)"


@dataclass(frozen=True)
class ClusterSummary:
    """One cluster: rows per split, mean cosine to the centroid, its most typical prompts."""

    cluster: int
    rows: int
    similarity: float
    prompts: list[str]


@dataclass(frozen=True)
class TaskRow:
    """How many rows of a task are in each cluster, and that as shares (fraction) of the task."""

    task: str
    split: str
    total: int
    counts: list[int]
    shares: list[float]


def clustering_quality(clustering: Clustering) -> list[Fact]:
    """Return the measured qualities of a clustering."""
    qualities = (
        ("silhouette", clustering.silhouette, "1: far apart"),
        ("ARI with tasks", clustering.ari, "1: identical"),
        ("NMI with tasks", clustering.nmi, "1: identical"),
    )
    return [
        Fact(title, number(value, 3), note) for title, value, note in qualities if value is not None
    ]


def summarise_clusters(contents: Contents) -> list[ClusterSummary]:
    """Summarise the training rows of each cluster, dropped noise left out."""
    rows = contents.training_rows
    groups = {k: rows[rows["cluster"] == k] for k in cluster_ids(contents) if k >= 0}
    return [
        ClusterSummary(k, len(group), float(group["similarity"].mean()), _typical_prompts(group))
        for k, group in groups.items()
    ]


def tasks_by_cluster(contents: Contents) -> list[TaskRow]:
    """Count the rows of each task in each cluster, per split but the test split."""
    rows = contents.clusters.assign(task=contents.clusters["task"].fillna(_NO_TASK))
    if (rows["task"] == _NO_TASK).all():
        return []
    return [
        _task_row(task, split, part[part["task"] == task], cluster_ids(contents))
        for split in _SPLITS
        for part in [rows[rows["split"] == split]]
        for task in sorted(part["task"].unique())
    ]


def _task_row(task: str, split: str, rows: pd.DataFrame, ids: list[int]) -> TaskRow:
    counts = rows["cluster"].value_counts().reindex(ids, fill_value=0)
    return TaskRow(task, split, len(rows), counts.tolist(), (counts / len(rows)).tolist())


def cluster_ids(contents: Contents) -> list[int]:
    """Return the clusters in order, dropped noise (-1) last."""
    ids = contents.clusters["cluster"].unique().tolist()
    return sorted(ids, key=lambda cluster: (cluster < 0, cluster))


def _typical_prompts(group: pd.DataFrame) -> list[str]:
    nearest = group.sort_values(["similarity", "id"], ascending=[False, True])
    prompts = nearest["prompt"].drop_duplicates().head(_N_PROMPTS)
    return [shorten(prompt, _PROMPT_LENGTH) for prompt in prompts]
