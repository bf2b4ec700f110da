"""The data of a run, before anything else is loaded: files, rows, columns, and thresholds on them.

Not covered: datasets of the Hugging Face hub, which the run itself fetches.
"""

import importlib.util
from collections.abc import Collection
from pathlib import Path

from tclora.config import ClusterConfig, Config, DataConfig
from tclora.errors import DataError

HELD_OUT = ("test_path", "ood_path", "composition_path")


def check_data(config: Config) -> None:
    """Read every data file of a configuration as the run will, and check the thresholds on rows.

    Raises
    ------
    DataError
        If a file, of given embeddings too, is missing, empty or malformed, has unknown columns or
        bad rows, leaves no training row, or has too few of them for the configured clusters.
    ConfigError
        If rows are scored by running what the model wrote, and that is not allowed.
    """
    from tclora.cluster.given import given_width  # with pandas
    from tclora.data.demo import DEMO
    from tclora.data.examples import read_examples, read_rows
    from tclora.data.readers import is_local
    from tclora.evaluate.scorers import LEAVE, check_leave

    data = config.data
    if config.embed.vectors:
        given_width(Path(config.embed.vectors))
    named = {name: path for name in ("path", *HELD_OUT) if (path := getattr(data, name))}
    local = {name: path for name, path in named.items() if path != DEMO and is_local(path)}
    for name, path in local.items():
        _check_exists(name, path)
    if "path" in local:
        frame = read_examples(without_sources(data, set(named) - set(local)), config.seed).frame
        check_leave(
            frame["scorer"].unique(), allowed=config.evaluate.allow_code_execution, remedy=LEAVE
        )
        training = frame[frame["split"] == "train"]
        _check_thresholds(config.cluster, len(training), int(training["task"].isna().sum()))
        return
    for path in local.values():
        read_rows(data, path, config.seed)
    if data.path == DEMO:
        _check_thresholds(config.cluster, _demo_rows(data), 0)


def _check_exists(name: str, path: str) -> None:
    if not Path(path).exists():
        raise DataError(
            f"data.{name} must name a file or folder that exists, got {path!r}; correct the path"
        )


def without_sources(data: DataConfig, hub: Collection[str]) -> DataConfig:
    """Return the configuration without the named datasets of the hub, which would be fetched."""
    changed: dict[str, float | None]
    changed = dict.fromkeys(hub) | ({"test_fraction": 0.0} if "test_path" in hub else {})
    return data.model_copy(update=changed)


def _demo_rows(data: DataConfig) -> int:
    """Count the training rows that the demo's generator will make."""
    from tclora.data.demo import FAMILIES

    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError("data.path: 'demo' needs reasoning-gym: pip install tclora[demo]")
    if unknown := sorted(set(data.ood_tasks) - {family.task for family in FAMILIES}):
        raise DataError(
            f"data.ood_tasks must be task labels of the data, got {unknown}; "
            f"it has {sorted(family.task for family in FAMILIES)}"
        )
    trained = [f for f in FAMILIES if f.split == "train" and f.task not in data.ood_tasks]
    rows = len(trained) * data.demo_train_rows
    return min(rows, data.max_train_rows or rows)


def _check_thresholds(cluster: ClusterConfig, rows: int, unlabelled: int) -> None:
    """Refuse what no clustering of this many training rows can satisfy."""
    fitted = min(rows, cluster.fit_rows)
    from tclora.cluster.registry import clusterers

    counting = cluster.method in clusterers and clusterers[cluster.method].counts
    if counting and cluster.k != "auto":
        _check_at_most("k", cluster.k, rows)
    if counting and cluster.k == "auto":
        # A silhouette needs two clusters, and one of more than one row.
        _check_at_most("k_range[0]", max(2, cluster.k_range[0]), fitted - 1, "less one")
    if cluster.method == "hdbscan" and cluster.hdbscan_min_cluster_size != "auto":
        _check_at_most("hdbscan_min_cluster_size", cluster.hdbscan_min_cluster_size, fitted)
    if cluster.method == "task" and unlabelled:
        raise DataError(
            f"cluster.method: task needs a task label on every training row, {unlabelled} lack "
            "one; name the column in data.columns or use kmeans"
        )
    _check_at_most("min_rows", cluster.min_rows, rows)


def _check_at_most(field: str, value: int, limit: int, remark: str = "") -> None:
    if value > limit:
        counted = f"the number of training rows{f' {remark}' if remark else ''}"
        raise DataError(
            f"cluster.{field} must be at most {counted} ({limit}), got {value}; "
            f"lower cluster.{field} or give more rows"
        )
