"""Tasks from the input to the rows of each training job: read, embed, cluster, divide."""

from pathlib import Path

import numpy as np
import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file, save_file

from tasks.artifact import Artifact, stage
from tclora.cluster.centroids import NOISE
from tclora.cluster.embed import embed_texts
from tclora.cluster.quality import agreement, map_2d
from tclora.cluster.rows import cluster_rows
from tclora.config import ClusterConfig, DataConfig, EmbedConfig
from tclora.data.examples import profile, read_examples
from tclora.files import atomic_path
from tclora.model.locate import cache_dir, default_device, load_tokenizer

JOINT = "joint"
WORK = "work"  # intermediate files, below the library directory


@stage("tclora.data.examples", name="read")
def read(
    config: DataConfig, seed: int, base: str, max_tokens: int, source_digest: str, root: Path
) -> Artifact:
    """Read, check and split the examples; `source_digest` tells a changed file from an old one."""
    examples = read_examples(config, seed)
    tokenizer = load_tokenizer(base)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts).input_ids]

    metrics = profile(examples, count, max_tokens)
    for line in examples.skipped:
        get_run_logger().warning("left out: %s", line)
    with atomic_path(root / WORK / "examples.parquet") as fresh:
        examples.frame.to_parquet(fresh)
    return Artifact.of(
        root, f"{WORK}/examples.parquet", metrics=metrics, info={"skipped": examples.skipped}
    )


@stage("tclora.cluster.embed", name="embed")
def embed(examples: Artifact, config: EmbedConfig, location: str, digest: str) -> Artifact:
    """Embed the prompts of all rows."""
    frame = pd.read_parquet(examples.path, columns=["prompt"])
    vectors = embed_texts(
        frame["prompt"].tolist(),
        location,
        batch_size=config.batch_size,
        device=default_device(),
        cache=cache_dir() / "embeddings",
        model_digest=digest,
    )
    name = f"{WORK}/embeddings.safetensors"
    with atomic_path(examples.root / name) as fresh:
        save_file({"embeddings": vectors}, fresh)
    return Artifact.of(examples.root, name, info={"dimensions": int(vectors.shape[1])})


@stage("tclora.cluster", name="cluster")
def cluster(examples: Artifact, embeddings: Artifact, config: ClusterConfig, seed: int) -> Artifact:
    """Cluster the training rows and assign every other row by the clusterer's own rule."""
    frame = pd.read_parquet(examples.path)
    vectors = load_file(embeddings.path)["embeddings"]
    training = (frame["split"] == "train").to_numpy()
    tasks = frame["task"].tolist()
    known = [task for task, row in zip(tasks, training, strict=True) if row]
    result = cluster_rows(vectors[training], config, tasks=known, seed=seed)
    labels = np.empty(len(frame), dtype=np.int64)
    labels[training] = result.labels
    unseen = [task for task, row in zip(tasks, training, strict=True) if not row]
    labels[~training] = result.assign(vectors[~training], unseen)
    points = map_2d(vectors, seed)
    table = frame[["id", "prompt", "task", "split"]].assign(
        cluster=labels,
        similarity=(vectors * result.centroids[np.maximum(labels, 0)]).sum(axis=1),
        x=points[:, 0],
        y=points[:, 1],
    )
    root = examples.root
    with atomic_path(root / "clusters.parquet") as fresh:
        table.to_parquet(fresh)
    with atomic_path(root / "centroids.safetensors") as fresh:
        save_file({"centroids": result.centroids}, fresh)
    logger = get_run_logger()
    for notice in result.notices:
        logger.info(notice)
    ari, nmi = agreement(result.labels, known) or (None, None)
    sizes = [int((result.labels == k).sum()) for k in range(result.k)]
    dropped = int((result.labels == NOISE).sum())
    info = {
        "method": config.method, "k": result.k, "silhouette": result.silhouette, "ari": ari,
        "nmi": nmi, "notices": result.notices, "sizes": sizes, "dropped": dropped,
    }  # fmt: skip
    figures = {key: info[key] for key in ("k", "silhouette", "ari", "nmi", "dropped")}
    metrics = {f"cluster/{key}": value for key, value in figures.items() if value is not None}
    return Artifact.of(
        root, "clusters.parquet", "centroids.safetensors", metrics=metrics, info=info
    )


@stage("tclora.cluster", name="divide")
def divide(examples: Artifact, clusters: Artifact, joint: bool) -> dict[str, Artifact]:
    """Write the rows of every training job, and those to evaluate, to files of their own.

    A file's digest changes only with its own rows: re-clustering that leaves a cluster as it was
    leaves its adapter as it was.
    """
    frame = pd.read_parquet(examples.path)
    labels = pd.read_parquet(clusters.path, columns=["cluster"])["cluster"]
    frame = frame.assign(cluster=labels.to_numpy())
    training = frame[frame["split"] == "train"]
    groups = {f"cluster-{k}": training[training["cluster"] == k] for k in range(clusters.info["k"])}
    if joint:
        groups[JOINT] = training[training["cluster"] != NOISE]
    parts = {
        name: rows[["prompt", "response"]].reset_index(drop=True) for name, rows in groups.items()
    }
    held_out = frame[frame["split"] != "train"].reset_index(drop=True)
    if not held_out.empty:
        parts["evaluation"] = held_out
    root = examples.root
    for name, rows in parts.items():
        with atomic_path(root / WORK / "rows" / f"{name}.parquet") as fresh:
            rows.to_parquet(fresh)
    return {
        name: Artifact.of(root, f"{WORK}/rows/{name}.parquet", info={"rows": len(rows)})
        for name, rows in parts.items()
    }
