"""Read, embed, cluster and divide, each as a function of its files."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from tasks.artifact import Artifact
from tasks.prepare import HELD_OUT, cluster, divide, embed, read, tokenise
from tclora.config import ClusterConfig, DataConfig, EmbedConfig
from tclora.errors import DataError
from tclora.library.names import JOINT
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder
from tclora.model.token_file import TokenFile


def data(tmp_path, rows, **values):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(file), test_fraction=0.25, **values)


ROWS = [{"prompt": f"say {i}", "response": str(i)} for i in range(12)]


def test_rows_are_read_split_and_counted(tmp_path, where, tiny_model_dir):
    config = data(tmp_path, [*ROWS, {"prompt": "empty", "response": ""}], on_bad_row="skip")
    found = read.fn(config, "digest", str(tiny_model_dir), 64, 0, where)
    frame = pd.read_parquet(found.path)
    assert found.path == where.layout.examples
    assert frame["split"].value_counts().to_dict() == {"train": 9, "test": 3}
    assert len(found.info["skipped"]) == 1
    assert "rows.jsonl" in found.info["skipped"][0]
    assert found.metrics["rows_train"] == 9


def test_a_bad_row_stops_the_stage_and_leaves_nothing(tmp_path, where, tiny_model_dir):
    config = data(tmp_path, [*ROWS, {"prompt": "empty", "response": ""}])
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read.fn(config, "digest", str(tiny_model_dir), 64, 0, where)
    assert not where.layout.examples.exists()


@pytest.fixture
def examples(where):
    """Eight training rows of two tasks in turn, and two others."""
    frame = pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(10)],
            "prompt": [("add", "reverse")[i % 2] + f" {i}" for i in range(10)],
            "response": [str(i) for i in range(10)],
            "task": [("add", "reverse")[i % 2] for i in range(10)],
            "split": ["train"] * 8 + ["test", "ood"],
        }
    )
    where.layout.examples.parent.mkdir(parents=True)
    frame.to_parquet(where.layout.examples)
    return Artifact.of(where.layout.root, where.layout.examples)


@pytest.fixture
def embeddings(where, examples):
    """Two well separated directions."""
    vectors = np.eye(4, dtype=np.float32)[[i % 2 for i in range(10)]]
    vectors[:, 2] = np.linspace(0, 0.1, 10)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    save_file({"embeddings": vectors}, where.layout.embeddings)
    return Artifact.of(where.layout.root, where.layout.embeddings)


def test_prompts_are_embedded_in_order(tmp_path, where, examples, monkeypatch):
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "cache"))
    location = locate_embedder(BUILTIN_EMBEDDER)
    found = embed.fn(examples, EmbedConfig(), location, "digest", None, where)
    vectors = load_file(found.path)["embeddings"]
    assert vectors.shape == (10, found.info["dimensions"])
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1]


def test_training_rows_are_clustered_and_the_others_assigned(where, examples, embeddings):
    found = cluster.fn(examples, embeddings, None, ClusterConfig(k=2, min_rows=2), 0, where)
    table = pd.read_parquet(found.path)
    labels = table["cluster"].to_numpy()
    assert (labels[::2] == labels[0]).all()
    assert (labels[1::2] == labels[1]).all()
    assert labels[0] != labels[1]
    assert found.info["sizes"] == [4, 4]
    assert found.metrics["cluster/ari"] == 1
    assert load_file(where.layout.centroids)["centroids"].shape == (2, 4)


def test_the_tokens_of_an_adapters_rows_are_those_its_texts_give(
    where, examples, embeddings, base, monkeypatch
):
    monkeypatch.setattr("tasks.prepare._TOKENISED", 3)
    clusters = cluster.fn(examples, embeddings, None, ClusterConfig(k=2, min_rows=2), 0, where)
    tokens = tokenise.fn(examples, base, where)
    loaded = base.load()
    for name, part in divide.fn(examples, tokens, clusters, True, where).items():
        if name != HELD_OUT:
            texts, own = part.paths
            assert list(TokenFile(own)) == loaded.encode(texts)
    assert tokens.metrics["rows"] == 8
    assert tokens.metrics["tokens"] == sum(map(len, loaded.rows(where.layout.row_tokens(JOINT))))


def test_a_clusters_file_changes_only_with_its_own_rows(where, examples, embeddings, base):
    clusters = cluster.fn(examples, embeddings, None, ClusterConfig(k=2, min_rows=2), 0, where)
    first = divide.fn(examples, tokenise.fn(examples, base, where), clusters, True, where)
    assert set(first) == {"cluster-0", "cluster-1", JOINT, HELD_OUT}
    assert [first[n].info["rows"] for n in ("cluster-0", "cluster-1", JOINT, HELD_OUT)] == [
        4, 4, 8, 2,
    ]  # fmt: skip
    frame = pd.read_parquet(where.layout.examples)
    own = pd.read_parquet(where.layout.clusters)["cluster"].eq(0) & frame["split"].eq("train")
    frame.loc[own.idxmax(), "response"] = "another"
    frame.to_parquet(where.layout.examples)
    changed = Artifact.of(where.layout.root, where.layout.examples)
    again = divide.fn(changed, tokenise.fn(changed, base, where), clusters, False, where)
    assert JOINT not in again
    assert again["cluster-0"].digest != first["cluster-0"].digest
    assert again["cluster-1"].digest == first["cluster-1"].digest
