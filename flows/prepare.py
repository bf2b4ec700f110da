"""From the input to the rows of each adapter."""

from prefect import flow

from flows.context import Context, Prepared
from tasks.prepare import HELD_OUT, cluster, divide, embed, read
from tasks.tracking import announce
from tclora.data.readers import source_digest
from tclora.library.names import JOINT


@flow(name="prepare", validate_parameters=False)
def prepare(context: Context) -> Prepared:
    """Read, embed and cluster the examples, and divide them among adapters."""
    cfg, models, where = context.config, context.models, context.where
    digest = source_digest(cfg.data)
    examples = read(cfg.data, digest, models.base, cfg.train.max_tokens, cfg.seed, where)
    announce("read", examples.metrics)
    embeddings = embed(examples, cfg.embed, models.embedder, models.embedder_digest, where)
    clusters = cluster(examples, embeddings, cfg.cluster, cfg.seed, where)
    announce("cluster", clusters.metrics | {"sizes": clusters.info["sizes"]})
    rows = divide(examples, clusters, cfg.train.joint, where)
    joint, held_out = rows.pop(JOINT, None), rows.pop(HELD_OUT, None)
    return Prepared(examples, embeddings, clusters, rows, joint, held_out)
