import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

from tclora.cluster import vectors as module
from tclora.cluster.centroids import NOISE, assign, centroids
from tclora.cluster.quality import map_2d, silhouette
from tclora.cluster.rows import cluster_rows
from tclora.cluster.vectors import VectorFile, by_blocks, sample
from tclora.config import ClusterConfig
from tclora.errors import DataError
from tests.cluster.test_rows import blobs


@pytest.fixture
def stored(tmp_path):
    """Vectors, and a file of them among others: its odd rows."""
    vectors, _ = blobs(spread=0.3)
    whole = VectorFile.create(tmp_path / "v.safetensors", 2 * len(vectors), vectors.shape[1])
    whole[1::2] = vectors
    return vectors, VectorFile.open(whole.path).take(np.arange(1, 2 * len(vectors), 2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 17)


def test_safetensors_reads_what_is_written_and_the_other_way_round(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    written = VectorFile.create(tmp_path / "a", 4, 3)
    written[:2], written[[3, 2]] = values[:2], values[[3, 2]]
    np.testing.assert_array_equal(load_file(tmp_path / "a")["embeddings"], values)
    save_file({"embeddings": values}, tmp_path / "b", metadata={"made": "elsewhere"})
    np.testing.assert_array_equal(np.asarray(VectorFile.open(tmp_path / "b")), values)


def test_a_file_is_read_like_an_array(stored):
    vectors, file = stored
    rows = np.array([5, 2, 2])
    assert (len(file), file.shape) == (len(vectors), vectors.shape)
    np.testing.assert_array_equal(file[rows], vectors[rows])
    np.testing.assert_array_equal(file[3:9], vectors[3:9])
    np.testing.assert_array_equal(np.asarray(file), vectors)
    np.testing.assert_array_equal(file.take(rows)[1:], vectors[rows][1:])
    assert np.asarray(file, dtype=np.float64).dtype == np.float64
    assert len(file.take(rows[:0])[:]) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 2), np.float32)}, "one matrix"),
        ({"embeddings": np.zeros(3, np.float32)}, "one matrix"),
        ({"embeddings": np.zeros((2, 2))}, "must hold float32, got F64"),
    ],
)
def test_another_file_is_refused(tmp_path, values, message):
    save_file(values, tmp_path / "file")
    with pytest.raises(DataError, match=message):
        VectorFile.open(tmp_path / "file")


def test_a_file_that_is_none_of_safetensors_is_refused(tmp_path):
    (tmp_path / "text").write_text("no safetensors, by far")
    with pytest.raises(DataError, match="must be a safetensors file of one matrix"):
        VectorFile.open(tmp_path / "text")


def test_blocks_change_no_figure(stored):
    vectors, file = stored
    labels = np.random.default_rng(0).integers(-1, 3, len(vectors))
    means = np.stack([vectors[labels == k].mean(axis=0) for k in range(3)])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids(file, labels), unit, rtol=1e-5)
    assert NOISE in labels
    nearest, similarity = assign(file, unit.astype(np.float32))
    np.testing.assert_array_equal(nearest, (vectors @ unit.T).argmax(axis=1))
    np.testing.assert_allclose(similarity, (vectors @ unit.T).max(axis=1), rtol=1e-5)
    assert silhouette(file, labels) == silhouette(vectors, labels)
    np.testing.assert_array_equal(by_blocks(lambda v: v.sum(axis=1), file), vectors.sum(axis=1))
    np.testing.assert_array_equal(sample(file, 9, seed=1), sample(vectors, 9, seed=1))
    wanted = PCA(2, random_state=0).fit_transform(vectors)
    np.testing.assert_allclose(map_2d(file), wanted, atol=1e-4)


@pytest.mark.parametrize("method", ["kmeans", "hdbscan", "random"])
@pytest.mark.parametrize("fit_rows", [100, 1000])
def test_clusters_of_a_file_are_those_of_the_array(stored, method, fit_rows):
    vectors, file = stored
    config = ClusterConfig(
        method=method, k=3, min_rows=1, fit_rows=fit_rows, hdbscan_min_cluster_size=5
    )
    here, there = cluster_rows(vectors, config), cluster_rows(file, config)
    np.testing.assert_array_equal(here.labels, there.labels)
    np.testing.assert_array_equal(here.assign(vectors[:20]), there.assign(file[:20]))
    np.testing.assert_allclose(here.centroids, there.centroids, atol=1e-6)
