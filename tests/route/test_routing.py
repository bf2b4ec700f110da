import numpy as np
import pandas as pd
import pytest
import torch

from tclora.route import Gating, Routing, TokenRule, routing_from_table, together
from tests.route.conftest import CLUSTERS
from tests.route.test_gating import loaded, logits

WEIGHTS = np.array([[1, 0, 0], [0, 0, 1], [0.25, 0.5, 0.25], [0, 1, 0]], np.float32)
KNOWN = np.array([True, True, True, False])
SIMILARITY = np.array([0.9, 0.8, 0.7, 0.1], np.float32)
BELONGING = np.array([1, 0.75, 0.5, 0.125], np.float32)
RULES = [None, TokenRule(), TokenRule(0.5, 2)]


def routing(by_token=None, belonging=None):
    return Routing(WEIGHTS, KNOWN, SIMILARITY, by_token=by_token, belonging=belonging)


def same(one, other):
    return one.by_token == other.by_token and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("weights", "known", "similarity", "shares")
    )


@pytest.fixture
def gating(tiny_model, gated, tmp_path):
    return Gating(loaded(tiny_model, gated.adapter, tmp_path / "static"), gated)


@pytest.mark.parametrize("belonging", [None, BELONGING], ids=["step", "smooth"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_table_gives_the_routing_back(rule, belonging, tmp_path):
    given = routing(rule, belonging)
    given.table(CLUSTERS).assign(task="t").to_parquet(tmp_path / "routing.parquet")
    table = pd.read_parquet(tmp_path / "routing.parquet")
    assert same(routing_from_table(table, CLUSTERS), given)
    former = routing_from_table(table.drop(columns="belonging"), CLUSTERS)
    assert (former.shares == KNOWN).all()  # version 0.1.0
    empty = routing(rule).take([]).table(CLUSTERS)
    assert routing_from_table(empty, CLUSTERS).weights.shape == (0, 3)


def test_a_table_judges_the_router_by_its_probabilities():
    likely = np.array([[0.2, 0.7, 0.1]], np.float32)
    one = Routing(WEIGHTS[:1], KNOWN[:1], SIMILARITY[:1], likely)
    assert one.table(CLUSTERS).loc[0, ["nearest", "confidence"]].tolist() == pytest.approx([1, 0.7])
    assert routing().table(CLUSTERS)["nearest"].tolist() == [0, 2, 1, 1]


def test_a_table_without_a_cluster_is_refused():
    with pytest.raises(ValueError, match=r"lacks \['cluster-1', 'known'\]"):
        routing_from_table(routing().table(CLUSTERS).drop(columns=["cluster-1", "known"]), CLUSTERS)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_parts_make_the_whole(rule):
    for whole in (routing(rule), routing(rule, BELONGING)):
        assert same(together([whole.take([row]) for row in range(4)]), whole)
    with pytest.raises(ValueError, match="of one token rule"):
        together([routing(rule), routing(TokenRule(3.0))])


def test_a_routing_gates_rows_or_tokens(gating, tiny_model):
    static = logits(tiny_model)
    with routing().context(gating):
        by_row = logits(tiny_model)
    with gating.applied(torch.from_numpy(WEIGHTS), torch.from_numpy(KNOWN)):
        assert torch.equal(logits(tiny_model), by_row)
    with gating.applied_per_token(temperature=0.5, top_k=2):
        every = logits(tiny_model)
    with routing(TokenRule(0.5, 2)).context(gating):
        by_token = logits(tiny_model)
    assert torch.allclose(by_token[:3], every[:3], atol=1e-6)
    assert torch.allclose(by_token[3], static[3], atol=1e-6)
    assert (every - by_row).abs().max() > 0.1


def test_belonging_blends_with_the_fallback_by_row_and_by_token(gating, tiny_model):
    """At one half, a gate of half the clusters' and half the fallback's, in both ways."""
    name = next(iter(gating._layers))
    width = gating._layers[name].out_features
    components = torch.randn(4, 10, width, generator=torch.Generator().manual_seed(0))

    def gated(rule, share):
        given = routing(rule, np.full(4, share, np.float32))
        with given.context(gating):
            assert logits(tiny_model).isfinite().all()
            return gating._gate(name)(components)

    for rule in (None, TokenRule(0.5)):
        low, middle, high = (gated(rule, share) for share in (0.0, 0.5, 1.0))
        assert torch.allclose(middle, (low + high) / 2, atol=1e-5)
        assert torch.allclose(low, gated(None, 0.0), atol=1e-5)
        assert (low - high).abs().max() > 0.1


def test_unknown_rows_repeat_with_their_beams(gating, tiny_model):
    two = routing(TokenRule()).take([0, 3])
    with two.context(gating):
        beams = logits(tiny_model)
    with routing(TokenRule()).take([0, 0, 3, 3]).context(gating):
        assert torch.allclose(logits(tiny_model), beams, atol=1e-6)
    three = routing(TokenRule()).take([0, 1, 3])
    with three.context(gating), pytest.raises(ValueError, match="multiple of the 3 routed rows"):
        logits(tiny_model)
