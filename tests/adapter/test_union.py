import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.errors import AdapterError
from tclora.merge import merge
from tclora.route.gates import fit_gates
from tclora.tensor import factorise
from tests.merge.examples import MODULES, make_adapter

LAST = max(MODULES)


def spoilt(adapter, value, factor):
    """Return the adapter with one bad number in its last module."""
    copies = {m: LoraFactors(f.B.clone(), f.A.clone()) for m, f in adapter.modules.items()}
    copies[LAST][factor][1, 2] = value
    return Adapter(adapter.name, copies, adapter.base_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", [0, 1])
def test_factors_that_are_not_finite_are_refused_before_any_method_runs(value, factor):
    seen = []
    adapters = [make_adapter("a"), spoilt(make_adapter("b", seed=1), value, factor)]
    with pytest.raises(AdapterError, match=f"b: factors of {LAST} must be finite.*train it again"):
        merge(adapters, "uniform", progress=lambda *done: seen.append(done))
    assert not seen


def test_factorisation_and_gates_refuse_them_too():
    good = [make_adapter("a"), make_adapter("b", seed=1)]
    bad = [good[0], spoilt(good[1], torch.nan, 0)]
    with pytest.raises(AdapterError, match=f"b: factors of {LAST} must be finite"):
        factorise(bad, 2)
    with pytest.raises(AdapterError, match=f"b: factors of {LAST} must be finite"):
        fit_gates(bad, good[0])
    with pytest.raises(AdapterError, match=f"b: factors of {LAST} must be finite"):
        fit_gates(good, bad[1])
