"""The stages that calibrate and make the routed library."""

import json

import pandas as pd
import pytest
from safetensors.numpy import save_file

from tasks.artifact import Artifact
from tasks.merging import Given, Rows, merge
from tasks.routing import Rules, Texts, calibrate, route
from tclora.cluster.embed import embed_prompts
from tclora.config import GateConfig, RouterConfig
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder
from tclora.route import Abstention, Fallback, ModelIdentity, RoutedInfo, read_library
from tests.route.conftest import CLUSTERS, FAR, PROMPTS, embedder  # noqa: F401
from tests.tasks.conftest import write_rows


@pytest.fixture
def prompts(where, embedder):  # noqa: F811
    """Training prompts of the clusters, one held-out prompt of each, and a strange one."""
    rows = [
        (text, cluster, k, "train" if i else "test")
        for k, (cluster, texts) in enumerate(PROMPTS.items())
        for i, text in enumerate(texts)
    ]
    rows.append((FAR, None, 0, "ood"))
    frame = pd.DataFrame(rows, columns=["prompt", "task", "cluster", "split"])
    where.layout.work.mkdir(parents=True, exist_ok=True)
    frame.assign(id=frame["prompt"]).to_parquet(where.layout.clusters)
    vectors = embed_prompts(embedder, frame["prompt"].tolist())
    save_file({"embeddings": vectors}, where.layout.embeddings)
    parts = where.layout.embeddings, where.layout.clusters
    artifacts = (Artifact.of(where.layout.root, part) for part in parts)
    return Texts(*artifacts, locate_embedder(BUILTIN_EMBEDDER), "d")


@pytest.fixture
def given(adapters):
    return Given(adapters, None, None, None, 0)


@pytest.fixture
def merged(given, where):
    return merge.fn("uniform", given, {}, False, where)


def test_held_out_prompts_are_routed_and_counted(given, merged, where, prompts):
    same = ModelIdentity(id="tiny", digest="d")
    info = RoutedInfo(
        base_model=same, embedding_model=same, template="plain", max_tokens=64,
        method="uniform", clusters=CLUSTERS,
    )  # fmt: skip
    rules = Rules(Fallback(1.0, 0.5), Abstention(0.4, 0.0), 0.25, {})
    found = route.fn(info, merged, given, prompts, RouterConfig(), rules, where)
    assert found.paths == (where.layout.routed.folder, where.layout.routing)
    table = pd.read_parquet(where.layout.routing)
    assert sorted(table["split"]) == ["ood", "test", "test", "test"]
    assert set(CLUSTERS) <= set(table.columns)
    assert found.info["bytes_share"] > 0
    assert found.info["router"] == "nearest"
    assert found.info["by_token"] is False
    assert table.set_index("prompt").loc[FAR, "belonging"] == 0
    assert {name: found.info[name] for name in rules.figures} == {
        "fallback_spread": 1.0, "fallback_scale": 0.5, "abstain_at": 0.4, "abstain_width": 0.0,
        "static_share": 0.25,
    }  # fmt: skip
    gated = read_library(where.layout.routed.folder).gated
    module = next(iter(gated.gates))
    average = gated.elsewhere(module) / 0.5  # of a merge with room for all updates
    assert gated.static(module).tolist() == pytest.approx((0.875 * average).tolist(), rel=1e-2)


@pytest.fixture
def rows(where, base):
    rows = {
        name: write_rows(where, name, [(prompt, "ok") for prompt in part])
        for name, part in PROMPTS.items()
    }
    return Rows(base, rows, 2, 400, 0)


def test_rules_are_chosen_on_rows_of_every_cluster(given, merged, where, rows, prompts):
    found = calibrate.fn(merged, given, prompts, rows, GateConfig(), where)
    written = json.loads(where.layout.routing_calibration.read_text())
    assert found.info["fallback_scale"] == written["fallback"]["rule"]["scale"]
    assert found.info["abstain_at"] == written["abstention"]["rule"]["at"]
    assert len(written["probes"]) > 12
    rules = Rules.of(GateConfig(), found, 0.0)
    assert rules.fallback == Fallback(**written["fallback"]["rule"])
    assert rules.abstention == Abstention(**written["abstention"]["rule"])
    assert rules.figures["probes_never"] == written["abstention"]["never"]
    assert Rules.of(GateConfig(), None, 0.0) == Rules(Fallback(), Abstention(), 0.0, {})


def test_what_is_configured_is_not_searched_and_the_rest_is_chosen_beside_it(
    given, merged, where, rows, prompts
):
    gates = GateConfig(fallback_spread=0.5, fallback_scale=0.3, abstain_at=0.4)
    found = calibrate.fn(merged, given, prompts, rows, gates, where)
    written = json.loads(where.layout.routing_calibration.read_text())
    assert written["fallback"] == {"rule": {"spread": 0.5, "scale": 0.3}, "losses": []}
    at_none = [probe["losses"][0] for probe in written["probes"]]
    assert written["abstention"]["rule"]["at"] == 0.4
    assert "probes_loss" in Rules.of(gates, found, 0.0).figures
    calibrate.fn(merged, given, prompts, rows, GateConfig(abstain_at=0.4), where)
    chosen = json.loads(where.layout.routing_calibration.read_text())
    assert [probe["losses"][0] for probe in chosen["probes"]] != pytest.approx(at_none, rel=1e-9)


def test_no_loss_is_published_of_an_abstention_that_is_configured(
    given, merged, where, rows, prompts
):
    gates = GateConfig(fallback_scale=0.5, abstain_at=0.4, abstain_width=0)
    found = calibrate.fn(merged, given, prompts, rows, gates, where)
    written = json.loads(where.layout.routing_calibration.read_text())
    assert (written["abstention"], written["probes"], found.metrics) == (None, [], {})
    rules = Rules.of(gates, found, 0.0)
    assert rules == Rules(Fallback(**written["fallback"]["rule"]), Abstention(0.4, 0), 0.0, {})
    assert rules.fallback.scale == 0.5
