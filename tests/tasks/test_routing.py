"""The stage that makes the routed library."""

import pandas as pd
import pytest
from safetensors.numpy import save_file

from tasks.artifact import Artifact
from tasks.merging import Given, merge
from tasks.routing import route
from tclora.cluster.embed import embed_prompts
from tclora.config import RouterConfig
from tclora.route import ModelIdentity, RoutedInfo
from tests.route.conftest import CLUSTERS, FAR, PROMPTS, embedder  # noqa: F401


@pytest.fixture
def prompts(where, embedder):  # noqa: F811
    """Training prompts of the clusters, one held-out prompt of each, and a strange one."""
    rows = [
        (text, cluster, k, "train" if i else "test")
        for k, (cluster, texts) in enumerate(PROMPTS.items())
        for i, text in enumerate(texts)
    ]
    rows.append((FAR, None, 0, "ood"))
    frame = pd.DataFrame(rows, columns=["prompt", "task", "cluster", "split"])
    where.layout.work.mkdir(parents=True, exist_ok=True)
    frame.assign(id=frame["prompt"]).to_parquet(where.layout.clusters)
    vectors = embed_prompts(embedder, frame["prompt"].tolist())
    save_file({"embeddings": vectors}, where.layout.embeddings)
    root = where.layout.root
    return Artifact.of(root, where.layout.embeddings), Artifact.of(root, where.layout.clusters)


def test_held_out_prompts_are_routed_and_counted(adapters, where, prompts):
    given = Given(adapters, None, None, None, 0)
    merged = merge.fn("uniform", given, None, False, where)
    same = ModelIdentity(id="tiny", digest="d")
    info = RoutedInfo(
        base_model=same, embedding_model=same, template="plain", max_tokens=64,
        method="uniform", clusters=CLUSTERS,
    )  # fmt: skip
    found = route.fn(info, merged, given, *prompts, RouterConfig(), where)
    assert found.paths == (where.layout.routed.folder, where.layout.routing)
    table = pd.read_parquet(where.layout.routing)
    assert sorted(table["split"]) == ["ood", "test", "test", "test"]
    assert set(CLUSTERS) <= set(table.columns)
    assert found.info["bytes_share"] > 0
    assert found.info["router"] == "nearest"
    assert found.info["by_token"] is False
