import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tclora.cluster import given
from tclora.cluster.given import given_width, place_vectors
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
        (5, np.ones(3), "row 6: must be of the first row's width, 4, got 3"),
        (0, np.ones(0), "row 1: must hold numbers, got none"),
        (0, None, "row 1: must hold numbers, got none"),
        (8, None, "row 9: must be of the first row's width, 4, got 0"),
        (2, np.array([1, None, 0, 0]), "row 3: must be finite and not zero"),
    ],
)
def test_a_bad_vector_is_named(place, row, value, message):
    values = list(vectors())
    values[row] = value
    with pytest.raises(DataError, match=message):
        place(PROMPTS, PROMPTS, values)


@pytest.mark.parametrize("widths", [(4, 4, 4, 4, 3, 3, 3, 3, 3), (4, 3, 5) * 3])
def test_vectors_of_different_width_are_refused_though_they_fill_the_same_space(place, widths):
    values = [np.ones(width) for width in widths]
    row = next(i for i, width in enumerate(widths) if width != 4) + 1
    with pytest.raises(DataError, match=f"row {row}: must be of the first row's width, 4, got 3"):
        place(PROMPTS, PROMPTS, values)


def test_the_width_is_that_of_the_first_row(tmp_path):
    pd.DataFrame({"prompt": PROMPTS, "embedding": list(vectors())}).to_parquet(tmp_path / "given")
    assert given_width(tmp_path / "given") == 4
    pd.DataFrame({"prompt": PROMPTS, "embedding": list(vectors())})[:0].to_parquet(
        tmp_path / "given", schema=pq.read_schema(tmp_path / "given")
    )
    with pytest.raises(DataError, match="must hold at least one row, got none"):
        given_width(tmp_path / "given")


def test_another_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"embed\.vectors must name a file that exists, got"):
        given_width(tmp_path / "given.parquet")
    for values in (["a"], [0.5], [["a", "b"]]):
        pd.DataFrame({"prompt": ["a"], "embedding": values}).to_parquet(tmp_path / "given.parquet")
        with pytest.raises(DataError, match="embedding must hold lists of numbers, got "):
            given_width(tmp_path / "given.parquet")
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "given.parquet")
    with pytest.raises(DataError, match=r"must have columns .* lacks embedding, prompt"):
        place_vectors(["a"], tmp_path / "given.parquet", tmp_path / "vectors")
    (tmp_path / "given.parquet").write_text("no table")
    with pytest.raises(DataError, match="must be a readable Parquet file"):
        place_vectors(["a"], tmp_path / "given.parquet", tmp_path / "vectors")
