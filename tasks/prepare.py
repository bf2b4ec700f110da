"""Stages from the input to the rows of each adapter: read, embed, cluster, divide."""

import numpy as np
import pandas as pd
from prefect import get_run_logger
from safetensors.numpy import load_file, save_file

from tasks.artifact import Artifact, Artifacts
from tasks.keys import stage
from tasks.where import Where
from tclora.cluster.centroids import NOISE
from tclora.cluster.embed import embed_texts
from tclora.cluster.quality import agreement, map_2d
from tclora.cluster.rows import cluster_rows
from tclora.config import ClusterConfig, DataConfig, EmbedConfig
from tclora.data.examples import profile, read_examples
from tclora.files import atomic_path
from tclora.library.names import JOINT, cluster_name
from tclora.model.locate import cache_dir, default_device, load_tokenizer

HELD_OUT = "held-out"  # the rows that methods are measured on, among those of the adapters


@stage("read")
def read(
    config: DataConfig, source_digest: str, base: str, max_tokens: int, seed: int, where: Where
) -> Artifact:
    """Read, check and split the examples; `source_digest` tells a changed file from an old one."""
    examples = read_examples(config, seed)
    tokenizer = load_tokenizer(base)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts).input_ids]

    metrics = profile(examples, count, max_tokens)
    for line in examples.skipped:
        get_run_logger().warning("left out: %s", line)
    with atomic_path(where.layout.examples) as fresh:
        examples.frame.to_parquet(fresh)
    info = {"skipped": examples.skipped}
    return Artifact.of(where.layout.root, where.layout.examples, metrics=metrics, info=info)


@stage("embed")
def embed(
    examples: Artifact, config: EmbedConfig, location: str, digest: str, where: Where
) -> Artifact:
    """Embed the prompts of all rows."""
    vectors = embed_texts(
        pd.read_parquet(examples.path, columns=["prompt"])["prompt"].tolist(),
        location,
        batch_size=config.batch_size,
        device=default_device(),
        cache=cache_dir() / "embeddings",
        model_digest=digest,
    )
    with atomic_path(where.layout.embeddings) as fresh:
        save_file({"embeddings": vectors}, fresh)
    info = {"dimensions": int(vectors.shape[1])}
    return Artifact.of(where.layout.root, where.layout.embeddings, info=info)


@stage("cluster")
def cluster(
    examples: Artifact, embeddings: Artifact, config: ClusterConfig, seed: int, where: Where
) -> Artifact:
    """Cluster the training rows and assign every other row to its nearest centroid."""
    frame = pd.read_parquet(examples.path)
    vectors = load_file(embeddings.path)["embeddings"]
    training = (frame["split"] == "train").to_numpy()
    tasks = frame["task"].to_numpy(object)
    known, unseen = tasks[training].tolist(), tasks[~training].tolist()
    result = cluster_rows(vectors[training], config, tasks=known, seed=seed)
    labels = np.empty(len(frame), dtype=np.int64)
    labels[training] = result.labels
    labels[~training] = result.assign(vectors[~training], unseen)
    points = map_2d(vectors, seed)
    table = frame[["id", "prompt", "task", "split"]].assign(
        cluster=labels,
        similarity=(vectors * result.centroids[np.maximum(labels, 0)]).sum(axis=1),
        x=points[:, 0],
        y=points[:, 1],
    )
    with atomic_path(where.layout.clusters) as fresh:
        table.to_parquet(fresh)
    with atomic_path(where.layout.centroids) as fresh:
        save_file({"centroids": result.centroids}, fresh)
    for notice in result.notices:
        get_run_logger().info(notice)
    ari, nmi = agreement(result.labels, known) or (None, None)
    figures = {
        "k": result.k, "silhouette": result.silhouette, "ari": ari, "nmi": nmi,
        "dropped": int((result.labels == NOISE).sum()),
    }  # fmt: skip
    sizes = [int((result.labels == k).sum()) for k in range(result.k)]
    return Artifact.of(
        where.layout.root,
        where.layout.clusters,
        where.layout.centroids,
        metrics={f"cluster/{key}": value for key, value in figures.items() if value is not None},
        info={**figures, "method": config.method, "notices": result.notices, "sizes": sizes},
    )


@stage("divide")
def divide(examples: Artifact, clusters: Artifact, joint: bool, where: Where) -> Artifacts:
    """Write the rows of every adapter, and those held out, to files of their own.

    A file's digest changes only with its own rows: re-clustering that leaves a cluster as it was
    leaves its adapter as it was.
    """
    frame = pd.read_parquet(examples.path)
    labels = pd.read_parquet(clusters.path, columns=["cluster"])["cluster"]
    frame = frame.assign(cluster=labels.to_numpy())
    training = frame[frame["split"] == "train"]
    groups = {cluster_name(k): training["cluster"] == k for k in range(clusters.info["k"])}
    if joint:
        groups[JOINT] = training["cluster"] != NOISE
    parts = {
        name: training.loc[chosen, ["prompt", "response"]].reset_index(drop=True)
        for name, chosen in groups.items()
    }
    held_out = frame[frame["split"] != "train"].reset_index(drop=True)
    if not held_out.empty:
        parts[HELD_OUT] = held_out
    written = {}
    for name, rows in parts.items():
        file = where.layout.held_out if name == HELD_OUT else where.layout.rows(name)
        with atomic_path(file) as fresh:
            rows.to_parquet(fresh)
        written[name] = Artifact.of(where.layout.root, file, info={"rows": len(rows)})
    return written
