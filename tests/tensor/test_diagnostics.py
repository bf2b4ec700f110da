import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.tensor import compress, core_consistency, cp_als, factorise, shared_share
from tclora.tensor.diagnostics import component_diagnostics, shared_structure
from tests.tensor.test_factorise import SHAPES, adapter


@pytest.fixture(scope="module")
def adapters():
    return [adapter(f"a{k}", seed=k, shared=1.0) for k in range(4)]


def test_every_module_tells_what_its_components_share(adapters):
    factors = factorise(adapters, 3)
    found = shared_structure(adapters, factors)
    assert list(found["module"]) == sorted(SHAPES)
    total = (found["shared"] * found["energy"]).sum() / found["energy"].sum()
    assert total == pytest.approx(shared_share(factors))
    parts = component_diagnostics(factors).groupby("module")
    assert list(found["energy"]) == pytest.approx(list(parts["energy"].sum()))
    assert found["spread"].between(1, 4).all()


def test_core_consistency_is_that_of_the_factors_on_the_cores(adapters):
    found = shared_structure(adapters, factorise(adapters, 3)).set_index("module")
    for module in SHAPES:
        own = [a.modules[module] for a in adapters]
        core = compress([f.B for f in own], [f.A for f in own])
        B, A = core.B[None], core.A[None]
        wanted = float(core_consistency(B, A, cp_als(B, A, 3)))
        assert found.loc[module, "core_consistency"] == pytest.approx(wanted, abs=1e-3)


def test_core_consistency_is_not_defined_above_the_number_of_adapters(adapters):
    assert shared_structure(adapters, factorise(adapters, 6))["core_consistency"].isna().all()


def test_a_module_that_is_zero_shares_nothing(adapters):
    zero = {m: LoraFactors(torch.zeros_like(f.B), f.A) for m, f in adapters[0].modules.items()}
    still = [Adapter(name, zero, "base") for name in ("one", "two")]
    found = shared_structure(still, factorise(still, 2))
    assert found["core_consistency"].isna().all()
    assert not found[["energy", "shared"]].to_numpy().any()
    assert (found["spread"] == 1).all()
