import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.model.cluster_loss import ClusterLoss
from tests.merge.examples import make_adapter
from tests.tune.small_model import MODULES, ROWS, loss_of

CLUSTERS = {"law": ROWS[:1], "prose": ROWS[1:]}


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("head", [False, True])
def test_every_cluster_has_the_loss_that_peft_measures(small_model, tmp_path, head, budget):
    """Also where the output layer has an update, which must see whole rows."""
    modules = MODULES | ({"lm_head": (16, 16)} if head else {})
    adapter = make_adapter("law", modules=modules, seed=3)
    losses = ClusterLoss(small_model, CLUSTERS, adapter.modules, token_budget=budget)
    for name, rows in CLUSTERS.items():
        wanted = loss_of(small_model, adapter, tmp_path / name, rows)
        assert losses.of(name, adapter) == pytest.approx(wanted, rel=1e-4)
        assert losses.of(name, None) != pytest.approx(wanted, rel=1e-3)


def test_gates_multiply_components(small_model):
    adapter = make_adapter("law", modules=MODULES, seed=3)
    losses = ClusterLoss(small_model, CLUSTERS, adapter.modules)
    gates = {m: torch.linspace(-1, 2, f.rank) for m, f in adapter.modules.items()}
    plain = {m: LoraFactors(f.B * gates[m], f.A) for m, f in adapter.modules.items()}
    wanted = losses.of("prose", Adapter("gated", plain))
    assert losses.of("prose", adapter, gates) == pytest.approx(wanted, rel=1e-5)
    assert losses.mean(adapter) != pytest.approx(wanted, rel=1e-3)
