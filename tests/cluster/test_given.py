import numpy as np
import pandas as pd
import pytest

from tclora.cluster import given
from tclora.cluster.given import place_vectors
from tclora.errors import DataError

PROMPTS = [f"prompt {i}" for i in range(9)]


def vectors(n=9, width=4):
    return np.random.default_rng(0).standard_normal((n, width))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(given, "_READ", 4)

    def place(texts, prompts, values):
        table = pd.DataFrame({"prompt": prompts, "embedding": list(values)})
        table.to_parquet(tmp_path / "given.parquet")
        target = tmp_path / "out" / "vectors.safetensors"
        target.parent.mkdir(exist_ok=True)
        found = np.asarray(place_vectors(texts, tmp_path / "given.parquet", target))
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        return found

    return place


def test_vectors_are_put_in_the_order_of_the_prompts_and_scaled(place):
    order = [3, 1, 1, 8, 0]
    values = vectors()
    found = place([PROMPTS[i] for i in order], [f" {p}\n" for p in PROMPTS], values)
    wanted = values / np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted[order], rtol=1e-6)
    assert found.dtype == np.float32


def test_a_prompt_without_a_vector_is_named(place):
    with pytest.raises(DataError, match="must hold every prompt, lacks 2, such as 'another'"):
        place([*PROMPTS, "another", "more", "another"], PROMPTS, vectors())


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (6, np.zeros(4), "row 7: must be finite and not zero"),
        (1, np.array([1, np.nan, 0, 0]), "row 2: must be finite and not zero"),
        (5, np.ones(3), "vectors of one width, got others from row 5 on"),
    ],
)
def test_a_bad_vector_is_named(place, row, value, message):
    values = list(vectors())
    values[row] = value
    with pytest.raises(DataError, match=message):
        place(PROMPTS, PROMPTS, values)


def test_parts_of_different_width_are_refused(place):
    values = [*vectors(4), *vectors(5, width=3)]
    with pytest.raises(DataError, match="vectors of one width, got 3 beside 4"):
        place(PROMPTS, PROMPTS, values)


def test_another_file_is_refused(tmp_path):
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "given.parquet")
    with pytest.raises(DataError, match=r"must have columns .* lacks embedding, prompt"):
        place_vectors(["a"], tmp_path / "given.parquet", tmp_path / "vectors")
    (tmp_path / "given.parquet").write_text("no table")
    with pytest.raises(DataError, match="must be a readable Parquet file"):
        place_vectors(["a"], tmp_path / "given.parquet", tmp_path / "vectors")
