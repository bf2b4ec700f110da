"""The joint CP with every update in the metric of its own cluster's inputs."""

from dataclasses import replace

import pytest
import torch

from tclora.adapter import LoraFactors
from tclora.merge import merge
from tclora.route import fit_gates
from tests.merge.dense import MODULE, dense, merged
from tests.merge.examples import NAMES
from tests.merge.test_oracles import regmean


def gated_errors(adapters, statistics, static):
    """Return how far each gated update is from its adapter, on the adapter's own inputs."""
    gated = fit_gates(adapters, static, statistics)
    errors = []
    for adapter, gram in zip(adapters, statistics.of(MODULE, NAMES), strict=True):
        gram = 0.9 * gram + 0.1 * gram.diagonal().diag()
        off = gated.cluster(adapter.name).modules[MODULE].delta() - adapter.modules[MODULE].delta()
        errors.append(float(torch.einsum("oi,ij,oj->", off.double(), gram, off.double())))
    return errors


def test_the_merge_in_the_clusters_own_metrics_serves_them_and_the_mean(adapters, statistics):
    full, metric = regmean(dense(adapters), statistics.of(MODULE, NAMES))
    options = {"statistics": statistics, "rank": 4}

    def error(delta):
        return float(torch.einsum("oi,ij,oj->", full - delta, metric, full - delta).sqrt())

    best = error(merged(adapters, "regmean", **options))
    strict = error(merged(adapters, "tc-lora-metric", emphasis=100, **options))
    assert strict == pytest.approx(best, rel=1e-3)
    loose = merge(adapters, "tc-lora-metric", emphasis=0.5, **options).adapter
    plain = merge(adapters, "regmean", **options).adapter
    served, before = (sum(gated_errors(adapters, statistics, a)) for a in (loose, plain))
    assert served < 0.95 * before


def test_a_small_adapter_counts_like_the_others_in_the_clusters_own_metrics(adapters, statistics):
    small = LoraFactors(adapters[0].modules[MODULE].B * 1e-3, adapters[0].modules[MODULE].A)
    shrunk = [replace(adapters[0], modules={**adapters[0].modules, MODULE: small}), *adapters[1:]]
    energies = [
        float(torch.einsum("oi,ij,oj->", d.double(), gram, d.double()))
        for d, gram in zip(
            (a.modules[MODULE].delta() for a in shrunk), statistics.of(MODULE, NAMES), strict=True
        )
    ]
    static = merge(shrunk, "tc-lora-metric", rank=4, emphasis=0.5, statistics=statistics).adapter
    lost = gated_errors(shrunk, statistics, static)[0] / energies[0]
    before = merge(
        shrunk, "tc-lora-activation", rank=4, emphasis=0.5, statistics=statistics
    ).adapter
    assert lost < 0.7 * gated_errors(shrunk, statistics, before)[0] / energies[0]


@pytest.mark.parametrize("method", ["tc-lora-activation", "tc-lora-metric"])
@pytest.mark.parametrize("emphasis", [0, -1, float("inf"), float("nan")])
def test_a_false_emphasis_is_refused(adapters, statistics, method, emphasis):
    with pytest.raises(ValueError, match="emphasis must be above 0 and finite"):
        merge(adapters, method, rank=4, statistics=statistics, emphasis=emphasis)
