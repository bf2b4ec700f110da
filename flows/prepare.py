"""From the input to the rows of each adapter."""

from pathlib import Path

from prefect import flow

from flows.context import Context, Prepared
from tasks.artifact import Artifact
from tasks.prepare import HELD_OUT, cluster, divide, embed, features, read, tokenise
from tasks.tracking import announce
from tclora.cluster.registry import clusterers
from tclora.config import AdapterConfig, FeatureConfig
from tclora.data.readers import source_digest
from tclora.files import sha256_path
from tclora.library.names import JOINT


@flow(name="prepare", validate_parameters=False)
def prepare(context: Context) -> Prepared:
    """Read, embed and cluster the examples, and divide them among adapters."""
    cfg, models, where = context.config, context.models, context.where
    digest = source_digest(cfg.data)
    where.run.client.set_tag(where.run.run_id, "tclora.data_sha256", digest)
    seed = cfg.seed if cfg.data.seed is None else cfg.data.seed
    examples = read(cfg.data, digest, models.base, cfg.train.max_tokens, seed, where)
    announce("read", examples.metrics)
    tokens = tokenise(examples, context.base, where)
    announce("tokenise", tokens.metrics)
    given = sha256_path(Path(cfg.embed.vectors)) if cfg.embed.vectors else None
    embeddings = embed(examples, cfg.embed, models.embedder, models.embedder_digest, given, where)
    seen = _features(context, examples, embeddings)
    clusters = cluster(examples, embeddings, seen, cfg.cluster, cfg.seed, where)
    announce("cluster", clusters.metrics | {"sizes": clusters.info["sizes"]})
    rows = divide(examples, tokens, clusters, cfg.train.joint, where)
    joint, held_out = rows.pop(JOINT, None), rows.pop(HELD_OUT, None)
    return Prepared(examples, embeddings, clusters, rows, joint, held_out)


def _features(context: Context, examples: Artifact, embeddings: Artifact) -> Artifact | None:
    """Look at the rows with the base model, if the clusterer divides them by that."""
    cfg = context.config
    if clusterers[cfg.cluster.method].features is None:
        return None
    with context.where.progress.shown():
        return features(
            cfg.cluster.method,
            examples,
            embeddings,
            cfg.cluster.only(FeatureConfig),
            cfg.train.only(AdapterConfig).model_copy(update={"data_parallel": 1}),
            context.base,
            cfg.seed,
            context.where,
        )
