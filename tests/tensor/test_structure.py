import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.tensor import compress, core_consistency, cp_als, factorise
from tclora.tensor.interference import MEASURES, interference
from tclora.tensor.structure import library_diagnostics
from tests.tensor.test_factorise import SHAPES, adapter


@pytest.fixture(scope="module")
def adapters():
    return [adapter(f"a{k}", seed=k, shared=1.0) for k in range(4)]


def test_the_tables_are_those_of_their_measures(adapters):
    factors = factorise(adapters, 3)
    seen = []
    found = library_diagnostics(
        adapters, factors, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (3, 3)
    assert list(found.tables) == ["components", "consistency", "pairs"]
    assert len(found.components) == 3 * len(SHAPES)
    assert (found.components["shared"] == (found.components["spread"] - 1) / 3).all()
    cosines = interference(adapters).cosine
    assert len(found.pairs) == 6
    for pair in found.pairs.itertuples():
        assert pair.cosine == cosines.loc[pair.first, pair.second]
    assert list(found.pairs.columns) == ["first", "second", *MEASURES]


def test_core_consistency_is_that_of_the_factors_where_it_is_defined(adapters):
    found = library_diagnostics(adapters, factorise(adapters, 3)).consistency.set_index("module")
    assert set(found["core_rank"]) == {3}
    for module in SHAPES:
        own = [a.modules[module] for a in adapters]
        core = compress([f.B for f in own], [f.A for f in own])
        B, A = core.B[None], core.A[None]
        wanted = float(core_consistency(B, A, cp_als(B, A, 3)))
        assert found.loc[module, "core_consistency"] == pytest.approx(wanted, abs=1e-3)


def test_core_consistency_is_measured_at_the_number_of_adapters_above_it(adapters):
    found = library_diagnostics(adapters, factorise(adapters, 6)).consistency
    assert set(found["core_rank"]) == {4}
    assert found["core_consistency"].between(-1e6, 100).all()


def test_a_module_that_is_zero_has_no_core_consistency(adapters):
    zero = {m: LoraFactors(torch.zeros_like(f.B), f.A) for m, f in adapters[0].modules.items()}
    still = [Adapter(name, zero, "base") for name in ("one", "two")]
    found = library_diagnostics(still, factorise(still, 2))
    assert found.consistency["core_consistency"].isna().all()
    assert not found.pairs[list(MEASURES)].to_numpy().any()


def test_one_adapter_has_no_pairs(adapters):
    found = library_diagnostics(adapters[:1], factorise(adapters[:1], 2))
    assert found.pairs.empty
    assert not found.components["shared"].any()


def test_factors_of_other_adapters_are_refused(adapters):
    with pytest.raises(ValueError, match="factors must be of the adapters a0, a1, got those of a0"):
        library_diagnostics(adapters[:2], factorise(adapters[:3], 2))
