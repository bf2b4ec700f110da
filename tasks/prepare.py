"""Stages from the input to the rows of each adapter: read, tokenise, embed, cluster, divide."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from prefect import get_run_logger
from safetensors.numpy import save_file

from tasks.artifact import Artifact, Artifacts
from tasks.keys import current_key, stage
from tasks.where import Where
from tclora.cluster.centroids import NOISE
from tclora.cluster.embed import embed_file
from tclora.cluster.features.request import FeatureRequest, compute_features
from tclora.cluster.given import place_vectors
from tclora.cluster.quality import agreement
from tclora.cluster.table import cluster_examples
from tclora.cluster.vectors import VectorFile
from tclora.config import AdapterConfig, ClusterConfig, DataConfig, EmbedConfig, FeatureConfig
from tclora.data.examples import profile, read_examples
from tclora.files import atomic_path, parquet_batches
from tclora.jobs.call import Event
from tclora.library.names import JOINT, cluster_name
from tclora.model.base import Base
from tclora.model.locate import devices_of, load_tokenizer, token_counter
from tclora.model.place import cache_dir
from tclora.model.token_file import write_chosen, write_tokens
from tclora.model.tokens import encode_frame

HELD_OUT = "held-out"  # the rows that methods are measured on, among those of the adapters
_TOKENISED = 10_000  # rows whose tokens are in memory at once


@stage("read")
def read(
    config: DataConfig, source_digest: str, base: str, max_tokens: int, seed: int, where: Where
) -> Artifact:
    """Read, check and split the examples; `source_digest` tells a changed file from an old one."""
    examples = read_examples(config, seed)
    metrics = profile(examples, token_counter(base), max_tokens)
    for line in examples.skipped:
        get_run_logger().warning("left out: %s", line)
    with atomic_path(where.layout.examples) as fresh:
        examples.frame.to_parquet(fresh)
    info = {"skipped": examples.skipped}
    return Artifact.of(where.layout.root, where.layout.examples, metrics=metrics, info=info)


@stage("tokenise")
def tokenise(examples: Artifact, base: Base, where: Where) -> Artifact:
    """Tokenise the training rows, once for all jobs that train on them."""
    tokenizer, target = load_tokenizer(base.here), where.layout.tokens
    blocks = (
        encode_frame(tokenizer, rows, template=base.template, max_tokens=base.max_tokens)
        for rows in _training_rows(examples.path)
    )
    with atomic_path(target) as fresh:
        counts = write_tokens(blocks, fresh)
    metrics = {name: float(count) for name, count in counts._asdict().items()}
    return Artifact.of(where.layout.root, target, metrics=metrics)


def _training_rows(examples: Path) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(examples) as table:
        for batch in parquet_batches(table, _TOKENISED, ["prompt", "response", "split"]):
            rows = batch.to_pandas().query("split == 'train'")
            if len(rows):  # a tokenizer refuses to read none
                yield rows


@stage("embed")
def embed(
    examples: Artifact,
    config: EmbedConfig,
    location: str,
    digest: str,
    given: str | None,
    where: Where,
) -> Artifact:
    """Embed the prompts of all rows; `given` tells changed vectors made elsewhere from old ones."""
    texts = pd.read_parquet(examples.path, columns=["prompt"])["prompt"]
    target = where.layout.embeddings
    if config.vectors:
        vectors = place_vectors(texts, Path(config.vectors), target)
    else:
        vectors = embed_file(
            texts,
            location,
            target,
            batch_size=config.batch_size,
            devices=devices_of(config.processes),
            cache=cache_dir() / "embeddings",
            model_digest=digest,
        )
    info = {"dimensions": vectors.shape[1]}
    return Artifact.of(where.layout.root, target, info=info)


@stage("features", "features-{method}")
def features(
    method: str,
    examples: Artifact,
    embeddings: Artifact,
    config: FeatureConfig,
    adapter: AdapterConfig,
    base: Base,
    seed: int,
    where: Where,
) -> Artifact:
    """Look at the training rows with the base model, for a clusterer that divides them by that."""
    layout = where.layout

    def on_event(event: Event) -> None:
        where.progress.update(method, event["done"], event["of"], "features")

    request = FeatureRequest(
        base=base,
        examples=examples.path,
        embeddings=embeddings.path,
        config=config,
        adapter=adapter,
        seed=seed,
        scratch=layout.checkpoint(f"features-{current_key()[:16]}"),
    )
    width = where.executor.run_isolated(
        compute_features, name=method, request=request, target=layout.features, on_event=on_event
    )
    return Artifact.of(layout.root, layout.features, info={"dimensions": width})


@stage("cluster")
def cluster(
    examples: Artifact,
    embeddings: Artifact,
    features: Artifact | None,
    config: ClusterConfig,
    seed: int,
    where: Where,
) -> Artifact:
    """Cluster the training rows and assign every other row to its nearest centroid."""
    frame = pd.read_parquet(examples.path, columns=["id", "prompt", "task", "split"])
    result, table = cluster_examples(
        frame,
        VectorFile.open(embeddings.path),
        config,
        features=VectorFile.open(features.path) if features else None,
        seed=seed,
    )
    with atomic_path(where.layout.clusters) as fresh:
        table.to_parquet(fresh)
    with atomic_path(where.layout.centroids) as fresh:
        save_file({"centroids": result.centroids}, fresh)
    for notice in result.notices:
        get_run_logger().info(notice)
    known = frame.loc[frame["split"] == "train", "task"].tolist()
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
def divide(
    examples: Artifact, tokens: Artifact, clusters: Artifact, joint: bool, where: Where
) -> Artifacts:
    """Write the rows of every adapter, and those held out, to files of their own.

    Those of an adapter are two files: texts, and tokens. A file's digest changes only with its own
    rows: re-clustering that leaves a cluster as it was leaves its adapter as it was.
    """
    labels = pd.read_parquet(clusters.path, columns=["cluster"])["cluster"].to_numpy()
    training = (pd.read_parquet(examples.path, columns=["split"])["split"] == "train").to_numpy()
    groups = {cluster_name(k): training & (labels == k) for k in range(clusters.info["k"])}
    if joint:
        groups[JOINT] = training & (labels != NOISE)
    texts = pd.read_parquet(examples.path, columns=["prompt", "response"])
    written = {
        name: _write_rows(
            where,
            where.layout.rows(name),
            texts[chosen],
            _write_tokens(tokens, np.flatnonzero(chosen[training]), where.layout.row_tokens(name)),
        )
        for name, chosen in groups.items()
    }
    if not training.all():
        rows = pd.read_parquet(examples.path, filters=[("split", "!=", "train")])
        held_out = rows.assign(cluster=labels[~training])
        written[HELD_OUT] = _write_rows(where, where.layout.held_out, held_out)
    return written


def _write_rows(where: Where, file: Path, rows: pd.DataFrame, *others: Path) -> Artifact:
    with atomic_path(file) as fresh:
        rows.reset_index(drop=True).to_parquet(fresh)
    return Artifact.of(where.layout.root, file, *others, info={"rows": len(rows)})


def _write_tokens(tokens: Artifact, places: NDArray[np.int64], file: Path) -> Path:
    with atomic_path(file) as fresh:
        write_chosen(tokens.path, places, fresh)
    return file
