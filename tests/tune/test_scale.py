from itertools import pairwise

import pytest
import torch

from tclora.merge import merge, methods
from tclora.model.cluster_loss import ClusterLoss
from tclora.tune.scale import is_scaled, scaled, tune_scale
from tests.merge.examples import assert_same_updates, make_statistics
from tests.tune.small_model import ROWS, loss_of

SCALES = (0.1, 0.5, 2.0)
CLUSTERS = {"law": ROWS[:1], "prose": ROWS[1:]}


def mean_over_clusters(model, adapter, folder):
    return sum(loss_of(model, adapter, folder, rows) for rows in CLUSTERS.values()) / 2


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "tsv-m"])
def test_the_scale_of_lowest_loss_is_taken(small_model, small_adapters, tmp_path, method):
    """Clusters count the same, however many tokens they have."""
    seen = []
    found = tune_scale(
        small_model, small_adapters, method, CLUSTERS, SCALES, rank=2,
        progress=lambda scale, loss: seen.append((scale, loss)),
    )  # fmt: skip
    wanted = {}
    for scale in found.losses:
        merged = merge(small_adapters, method, rank=2, scale=scale).adapter
        wanted[scale] = mean_over_clusters(small_model, merged, tmp_path / f"{scale}")
    assert set(SCALES) <= set(found.losses)
    assert found.losses == pytest.approx(wanted, rel=1e-5)
    assert found.scale == min(wanted, key=wanted.get)
    assert found.density is None
    assert dict(seen) == found.losses
    assert all(p.grad is None for p in small_model.parameters())


@pytest.mark.parametrize("grid", [(40.0, 80.0), (0.0001, 0.0002)])
def test_the_grid_goes_on_while_the_best_scale_is_at_its_end(small_model, small_adapters, grid):
    found = tune_scale(small_model, small_adapters, "task-arithmetic", CLUSTERS, grid)
    known = sorted(found.losses)
    assert len(known) > 2
    ratios = [high / low for low, high in pairwise(known)]
    assert ratios == pytest.approx([2.0] * len(ratios))
    assert len(known) == 8 or known[0] < found.scale < known[-1]


def test_the_density_of_lowest_loss_is_taken_where_there_is_one(small_model, small_adapters):
    found = tune_scale(
        small_model, small_adapters, "ties", CLUSTERS, SCALES, rank=2, densities=(0.2, 0.6, 1.0)
    )
    assert found.options == {"scale": found.scale, "density": found.density}
    for density in (0.2, 0.6, 1.0):
        alone = tune_scale(
            small_model, small_adapters, "ties", CLUSTERS, (found.scale,), rank=2,
            densities=(density,),
        )  # fmt: skip
        assert alone.losses[found.scale] >= min(found.losses.values()) - 1e-9
    whole = tune_scale(
        small_model, small_adapters, "tsv-m", CLUSTERS, SCALES, rank=2, densities=(0.2, 0.6)
    )
    assert whole.density is None


@pytest.mark.parametrize("method", [info.name for info in methods() if is_scaled(info.name)])
def test_a_merge_is_proportional_to_its_scale(method, adapters):
    one, other = (
        merge(adapters, method, rank=3, statistics=make_statistics(), scale=scale).adapter
        for scale in (1.0, 0.3)
    )
    assert_same_updates(other, scaled(one, 0.3), 1e-5)


def test_the_mean_is_over_clusters(small_model, small_adapters, tmp_path):
    merged = merge(small_adapters, "svd").adapter
    wanted = mean_over_clusters(small_model, merged, tmp_path / "x")
    losses = ClusterLoss(small_model, CLUSTERS, merged.modules)
    assert losses.mean(merged) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(loss_of(small_model, merged, tmp_path / "y", ROWS), rel=1e-4)


def test_what_has_no_scale_is_refused(small_model, small_adapters):
    assert is_scaled("ties")
    assert not is_scaled("uniform")
    with pytest.raises(ValueError, match="method must have a scale to tune, uniform has none"):
        tune_scale(small_model, small_adapters, "uniform", CLUSTERS)
    with pytest.raises(ValueError, match="scales must be positive"):
        tune_scale(small_model, small_adapters, "ties", CLUSTERS, (0.5, 0.0))


def test_the_model_is_left_as_it_was(small_model, small_adapters):
    ids = torch.tensor([[3, 4, 5]])
    before = small_model(input_ids=ids).logits
    tune_scale(small_model, small_adapters, "task-arithmetic", CLUSTERS)
    assert torch.equal(small_model(input_ids=ids).logits, before)
