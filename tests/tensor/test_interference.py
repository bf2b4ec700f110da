import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from tclora.adapter import Adapter, LoraFactors
from tclora.tensor.interference import MEASURES, interference


def adapter(name, factors, module="q"):
    return Adapter(name, {module: LoraFactors(*factors)})


def draw(rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(9, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, 7, generator=generator, dtype=torch.float64),
    )


def test_an_adapter_agrees_with_itself_and_fights_its_negative():
    B, A = draw()
    found = interference([adapter("a", (B, A)), adapter("b", (3 * B, A)), adapter("c", (-B, A))])
    assert found.cosine.loc["a", "b"] == pytest.approx(1)
    assert found.input_overlap.loc["a", "b"] == pytest.approx(1)
    assert found.sign_conflict.loc["a", "b"] == pytest.approx(0, abs=1e-10)
    assert found.cosine.loc["a", "c"] == pytest.approx(-1)
    assert found.output_overlap.loc["a", "c"] == pytest.approx(1)
    assert found.sign_conflict.loc["a", "c"] == pytest.approx(1)


def test_cosine_is_the_dense_one():
    one, two = draw(2), draw(3, seed=1)
    X, Y = one[0] @ one[1], two[0] @ two[1]
    found = interference([adapter("a", one), adapter("b", two)])
    expected = float((X * Y).sum() / (X.norm() * Y.norm()))
    assert found.cosine.loc["a", "b"] == pytest.approx(expected)
    assert 0 <= found.sign_conflict.loc["a", "b"] <= 1


def test_updates_of_different_inputs_do_not_meet():
    B, _ = draw()
    left, right = torch.eye(7).double()[:2], torch.eye(7).double()[2:4]
    found = interference([adapter("a", (B, left)), adapter("b", (B, right))])
    assert found.input_overlap.loc["a", "b"] == pytest.approx(0, abs=1e-12)
    assert found.output_overlap.loc["a", "b"] == pytest.approx(1)
    assert found.sign_conflict.loc["a", "b"] == 0


def test_splitting_an_update_differently_changes_nothing():
    one, two = draw(2), draw(3, seed=1)
    M = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
    mixed = (one[0] @ M, torch.linalg.solve(M, one[1]))
    first = interference([adapter("a", one), adapter("b", two)])
    second = interference([adapter("a", mixed), adapter("b", two)])
    for name in MEASURES:
        assert getattr(first, name).to_numpy() == pytest.approx(
            getattr(second, name).to_numpy(), abs=1e-5
        )


def test_modules_are_listed_per_pair_and_weighted_by_norm():
    one, two = draw(2), draw(2, seed=1)
    a = Adapter("a", {"q": LoraFactors(*one), "v": LoraFactors(0 * one[0], one[1])})
    b = Adapter("b", {"q": LoraFactors(*one), "v": LoraFactors(*two)})
    c = adapter("c", two)
    found = interference([a, b, c])
    assert len(found.modules) == 6
    assert set(found.modules["module"]) == {"q", "v"}
    assert found.cosine.loc["a", "b"] == pytest.approx(1)
    assert not found.modules.isna().any().any()


def test_pairs_list_every_two_adapters_once():
    generator = torch.Generator().manual_seed(0)
    found = interference(
        [
            adapter(
                n, (torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator))
            )
            for n in "abc"
        ]
    )
    pairs = found.pairs()
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [
        ("a", "b"), ("a", "c"), ("b", "c"),
    ]  # fmt: skip
    for pair in pairs.itertuples():
        assert pair.cosine == found.cosine.loc[pair.first, pair.second]
        assert pair.sign_conflict == found.sign_conflict.loc[pair.first, pair.second]


@pytest.mark.parametrize(("one", "two"), [(2, 2), (2, 3), (3, 1)])
def test_principal_angles_are_scipys(one, two):
    first, second = draw(one), draw(two, seed=1)
    found = interference([adapter("a", first), adapter("b", second)])
    for side, bases in (("input", (first[1].T, second[1].T)), ("output", (first[0], second[0]))):
        wanted = np.rad2deg(subspace_angles(*(basis.numpy() for basis in bases)))
        assert getattr(found, f"{side}_angle").loc["a", "b"] == pytest.approx(wanted.mean())
        assert getattr(found, f"{side}_nearest").loc["b", "a"] == pytest.approx(wanted.min())


def test_angles_of_equal_and_of_orthogonal_spaces():
    B = draw()[0]
    eye = torch.eye(7).double()
    found = interference([adapter("a", (B, eye[:2])), adapter("b", (B, eye[2:4]))])
    assert found.input_angle.loc["a", "b"] == pytest.approx(90)
    assert found.output_angle.loc["a", "b"] == pytest.approx(0, abs=1e-5)


def test_a_missing_module_has_no_angle_and_no_weight():
    found = interference([adapter("a", draw(), "q"), adapter("b", draw(seed=1), "v")])
    assert (found.modules["weight"] == 0).all()
    assert (found.modules["input_angle"] == 0).all()
