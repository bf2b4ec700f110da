import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from tclora.cluster import embed as embedding
from tclora.cluster.embed import embed_file, embed_texts
from tclora.errors import ModelError
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder

TEXTS = ["Add 3 and 4.", "What colour is the sky?", "Add 3 and 5.", "a" * 300, "", "Add 3 and 4."]


@pytest.fixture(scope="module")
def location():
    return locate_embedder(BUILTIN_EMBEDDER)


@pytest.fixture(scope="module")
def vectors(location, tmp_path_factory):
    return embed(TEXTS, location, tmp_path_factory.mktemp("embeddings"))


def embed(texts, location, folder, **options):
    target = folder / "target" / "vectors.safetensors"
    target.parent.mkdir(exist_ok=True)
    return np.asarray(embed_file(texts, location, target, **options))


def test_rows_are_unit_vectors_in_the_order_of_the_texts(vectors, location):
    assert vectors.shape == (6, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    model = SentenceTransformer(location, device="cpu")
    for text, vector in zip(TEXTS, vectors, strict=True):
        (wanted,) = model.encode([text], normalize_embeddings=True, show_progress_bar=False)
        np.testing.assert_allclose(vector, wanted, atol=1e-5)


def test_a_few_texts_need_no_file(vectors, location, tmp_path):
    found = embed_texts(TEXTS, location, cache=tmp_path, model_digest="m")
    np.testing.assert_array_equal(found, vectors)


def test_equal_texts_have_equal_vectors_and_similar_ones_similar(vectors):
    np.testing.assert_array_equal(vectors[0], vectors[5])
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.3


def test_the_batch_size_does_not_matter(vectors, location, tmp_path, monkeypatch):
    np.testing.assert_allclose(embed(TEXTS, location, tmp_path, batch_size=1), vectors, atol=1e-5)
    monkeypatch.setattr(embedding, "_ENCODED", 2)
    np.testing.assert_allclose(embed(TEXTS, location, tmp_path), vectors, atol=1e-5)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["vectors.safetensors"]


def test_several_processes_give_the_same_vectors(vectors, location, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_SHARE", 2)
    several = embed(TEXTS, location, tmp_path, devices=["cpu", "cpu"])
    np.testing.assert_allclose(several, vectors, atol=1e-5)


def test_results_are_read_from_the_cache(location, tmp_path, vectors):
    cache = tmp_path / "cache"
    first = embed(TEXTS, location, tmp_path, cache=cache, model_digest="m")
    np.testing.assert_array_equal(first, vectors)
    (file,) = cache.iterdir()
    # Marked, so that a hit can be told from a computation.
    save_file({"embeddings": -load_file(file)["embeddings"]}, file)
    again = embed(TEXTS[::-1], location, tmp_path, cache=cache, model_digest="m")
    np.testing.assert_array_equal(again, -first[::-1])
    other = embed(TEXTS, location, tmp_path, cache=cache, model_digest="another model")
    np.testing.assert_array_equal(other, first)
    fewer = embed(TEXTS[:2], location, tmp_path, cache=cache, model_digest="m")
    np.testing.assert_allclose(fewer, first[:2], atol=1e-5)
    assert len(list(cache.iterdir())) == 3


def test_a_model_that_is_not_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"embed.model .* cannot be loaded"):
        embed(["a"], str(tmp_path / "none"), tmp_path)


def test_vectors_that_are_not_finite_are_refused(location, tmp_path):
    model = SentenceTransformer(location, device="cpu")
    model[0].auto_model.embeddings.word_embeddings.weight.data[:] = float("nan")
    model.save(str(tmp_path / "broken"))
    with pytest.raises(ModelError, match="gave vectors that are not finite"):
        embed(["a"], str(tmp_path / "broken"), tmp_path)
