import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import module_factors, module_names
from tclora.errors import AdapterError
from tclora.tensor import compress


def factors(ranks, d_out=12, d_in=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Bs = [torch.randn(d_out, r, generator=generator, dtype=torch.float64) for r in ranks]
    As = [torch.randn(r, d_in, generator=generator, dtype=torch.float64) for r in ranks]
    return Bs, As


@pytest.mark.parametrize("ranks", [[3], [2, 2], [3, 0, 1], [4, 4, 4, 4], [12, 12]])
def test_the_core_carries_every_update_exactly(ranks):
    Bs, As = factors(ranks)
    core = compress(Bs, As)
    for k, (B, A) in enumerate(zip(Bs, As, strict=True)):
        torch.testing.assert_close(core.left @ core.core[k] @ core.right.mT, B @ A)


@pytest.mark.parametrize(("ranks", "m", "n"), [([3, 2], 5, 5), ([5, 5], 10, 9), ([8, 8], 12, 9)])
def test_bases_are_orthonormal_and_no_larger_than_the_module(ranks, m, n):
    core = compress(*factors(ranks))
    assert core.left.shape == (12, m)
    assert core.right.shape == (9, n)
    torch.testing.assert_close(core.left.mT @ core.left, torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(core.right.mT @ core.right, torch.eye(n, dtype=torch.float64))


def test_rank_deficient_stacks_are_exact():
    (B, _), (A, _) = factors([3, 3])
    core = compress([B, B, 0 * B], [A, A, A])
    torch.testing.assert_close(core.left @ core.core[1] @ core.right.mT, B @ A)
    assert not core.core[2].any()


def test_a_module_that_an_adapter_lacks_is_an_update_of_rank_zero():
    Bs, As = factors([3, 2])
    one = Adapter("one", {"x": LoraFactors(Bs[0], As[0])})
    two = Adapter("two", {"x": LoraFactors(Bs[1], As[1]), "y": LoraFactors(Bs[1], As[1])})
    assert module_names([one, two]) == ["x", "y"]
    assert [f.rank for f in module_factors([one, two], "y")] == [0, 2]


def test_shapes_that_disagree_are_refused_with_both_names():
    Bs, As = factors([3])
    one = Adapter("one", {"x": LoraFactors(Bs[0], As[0])})
    two = Adapter("two", {"x": LoraFactors(Bs[0][:5], As[0])})
    with pytest.raises(AdapterError, match=r"x must have one shape.*\(12, 9\) in 'one'.*'two'"):
        module_factors([one, two], "x")
