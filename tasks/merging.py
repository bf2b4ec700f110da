"""Tasks on adapters alone: joint factorisation, its explained variance, merging."""

from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger

from tasks.artifact import Artifact, stage
from tasks.data import WORK
from tclora.activations import ActivationStatistics
from tclora.adapter import Adapter, read_adapter, write_adapter
from tclora.files import atomic_path
from tclora.merge import merge as merge_adapters
from tclora.tensor import LibraryFactors, explained_variance_curve
from tclora.tensor import factorise as factorise_adapters

MERGED = "merged"
UNREFINED = f"{WORK}/unrefined"


def _read(adapters: Mapping[str, Artifact]) -> list[Adapter]:
    return [read_adapter(artifact.path, name) for name, artifact in adapters.items()]


def _root(adapters: Mapping[str, Artifact]) -> Path:
    return next(iter(adapters.values())).root


@stage("tclora.tensor", name="factorise")
def factorise(
    adapters: dict[str, Artifact], rank: int, n_starts: int, n_iter: int, seed: int
) -> Artifact:
    """Factorise all cluster adapters jointly at CP rank R."""
    factors = factorise_adapters(_read(adapters), rank, n_starts=n_starts, n_iter=n_iter, seed=seed)
    root = _root(adapters)
    factors.save(root / "factors.safetensors")
    explained = factors.explained_variance
    used = max(module.rank for module in factors.modules.values())
    if used < rank:
        get_run_logger().warning(
            "factorise.rank %d exceeds the adapters' total rank; %d, which is exact, is used",
            rank,
            used,
        )
    return Artifact.of(
        root,
        "factors.safetensors",
        metrics={"factors/rank": used, "factors/explained_variance": explained},
        info={"rank": used, "explained_variance": explained},
    )


@stage("tclora.tensor", name="explained-variance")
def explained_variance(
    adapters: dict[str, Artifact], ranks: tuple[int, ...], seed: int
) -> Artifact:
    """Explained variance against rank, per module and overall."""
    curve = explained_variance_curve(_read(adapters), ranks, seed=seed)
    root = _root(adapters)
    with atomic_path(root / "explained_variance.parquet") as fresh:
        curve.to_parquet(fresh)
    overall = curve[curve["module"] == "overall"]
    return Artifact.of(
        root,
        "explained_variance.parquet",
        metrics={
            f"factors/explained_variance_R{rank}": value
            for rank, value in zip(overall["rank"], overall["explained_variance"], strict=True)
        },
    )


@stage("tclora.merge", name="merge", task_run_name="merge-{method}")
def merge(
    method: str,
    adapters: dict[str, Artifact],
    factors: Artifact | None,
    statistics: Artifact | None,
    rank: int | None,
    seed: int,
    scale: float | None = None,
    folder: str = MERGED,
) -> Artifact:
    """Merge the cluster adapters by one method and write a stock PEFT directory.

    `factors` and `statistics` are given to methods that use them, `scale` where it was tuned.
    """
    grams = [statistics.root / name for name in statistics.files] if statistics else []
    merged = merge_adapters(
        _read(adapters),
        method,
        factors=LibraryFactors.load(factors.path) if factors else None,
        statistics=ActivationStatistics.load(*grams) if grams else None,
        rank=rank,
        seed=seed,
        **({} if scale is None else {"scale": scale}),
    )
    root = _root(adapters)
    write_adapter(merged.adapter, root / folder / method)
    tuned = () if scale is None else ("scale tuned on the calibration rows",)
    info = {
        "rank": merged.rank,
        "parameters": merged.parameters,
        "truncation_loss": merged.truncation_loss,
        "notes": "; ".join(merged.notes + tuned),
    }
    metrics = {f"merge/{key}": value for key, value in info.items() if key != "notes"}
    return Artifact.of(root, f"{folder}/{method}", metrics=metrics, info=info)
