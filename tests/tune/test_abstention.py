import numpy as np
import pandas as pd
import pytest
import torch

from tclora.data.rewording import rewordings
from tclora.merge import merge
from tclora.model.base import Base, LoadedBase
from tclora.model.tokens import encode
from tclora.route import Fallback
from tclora.route.gates import gate_equations
from tclora.tune.abstention import choose_abstention, make_probes, measure_probes
from tests.reference import row_nll
from tests.route.conftest import CLUSTERS, PROMPTS, adapters, embedder  # noqa: F401


@pytest.fixture
def embed(embedder):  # noqa: F811
    from tclora.cluster.embed import embed_prompts

    return lambda prompts: embed_prompts(embedder, prompts)


@pytest.fixture
def probes(embed):
    prompts = [prompt for part in PROMPTS.values() for prompt in part]
    rows = {
        name: pd.DataFrame({"prompt": part[:2], "response": ["ok", "yes"]})
        for name, part in PROMPTS.items()
    }
    return make_probes(rows, embed(prompts), np.repeat(np.arange(3), 3), embed, 0).reset_index(
        drop=True
    )


def test_every_row_is_a_probe_of_its_cluster_and_of_none(probes):
    own, foreign = probes[probes["kind"] == "own"], probes[probes["kind"] == "foreign"]
    assert own["prompt"].tolist() == foreign["prompt"].tolist()
    assert (own["nearest"] == own["cluster"]).all()
    assert (foreign["nearest"] != foreign["cluster"]).all()
    assert own["nearness"].min() > foreign["nearness"].max()
    reworded = probes[probes["kind"] == "reworded"]
    wanted = [
        other
        for _, part in own.groupby("cluster")
        for made in rewordings(part["prompt"].tolist())
        for other in made
    ]
    assert sorted(reworded["prompt"]) == sorted(wanted)


def test_probes_are_measured_between_fallback_and_nearest_gate(
    probes,
    adapters,  # noqa: F811
    tiny_model,
    tokenizer,
    tiny_model_dir,
    tmp_path,
):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from tclora.adapter import write_adapter

    merged = merge(adapters, "tc-lora-mean", rank=6).adapter
    fit = gate_equations(adapters, merged)
    base = Base(location=str(tiny_model_dir), digest="", dtype="float32", template="plain",
                max_tokens=200)  # fmt: skip
    loaded = LoadedBase(base, tiny_model, tokenizer)
    rule = Fallback(0.5, 0.8)
    losses = measure_probes(loaded, fit, rule, probes, 400)
    chosen = probes.groupby("kind").head(3)
    for number, probe in chosen.iterrows():
        left_out = probe["cluster"] if probe["kind"] == "foreign" else None
        fallback, own = fit.fallback(rule, left_out), fit.gated().gates
        for column, share in enumerate((0.0, 0.5, 1.0)):
            gates = {
                m: torch.lerp(fallback[m], own[m][probe["nearest"]], share).double() for m in own
            }
            folder = tmp_path / f"{number}-{column}"
            write_adapter(fit.unit._plain(gates, "one"), folder)
            model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
            model = PeftModel.from_pretrained(model, folder).eval()
            (row,) = encode(tokenizer, [probe["prompt"]], [probe["response"]], template="plain")
            wanted = row_nll(model, row) / len(row.response)
            assert losses[number, column] == pytest.approx(wanted, rel=1e-3)


def planted(n=400, seed=0):
    """Foreign rows lose by routing and lie below nearness 0.3, the others gain and lie above."""
    rng = np.random.default_rng(seed)
    foreign = np.arange(n) < n // 4
    nearness = np.where(foreign, rng.uniform(-0.2, 0.3, n), rng.uniform(0.3, 1.2, n))
    kinds = np.where(foreign, "foreign", "reworded")
    routed = np.where(foreign, 2.0, 1.0)
    losses = np.stack([3 - routed, np.full(n, 1.4), routed], axis=1)
    return pd.DataFrame({"kind": kinds, "nearness": nearness}), losses


def test_the_planted_threshold_is_found():
    found = choose_abstention(*planted())
    assert found.rule.at == pytest.approx(0.3, abs=0.03)
    assert found.loss == pytest.approx(1.0, abs=0.03)
    assert (found.never, found.always) == (pytest.approx(1.5), pytest.approx(1.5))


def test_both_kinds_count_alike_however_many_there_are():
    few, losses = planted()
    many = pd.concat([few, few[few["kind"] == "reworded"]], ignore_index=True)
    more = np.concatenate([losses, losses[(few["kind"] == "reworded").to_numpy()]])
    assert choose_abstention(many, more).never == pytest.approx(1.5)


def test_where_routing_never_hurts_nothing_is_turned_away():
    probes, losses = planted()
    losses[:] = [2.0, 1.5, 1.0]
    found = choose_abstention(probes, losses)
    shares = 1 / (1 + np.exp(-(probes["nearness"] - found.rule.at) / found.rule.width))
    assert shares.min() > 0.9
    assert found.loss == pytest.approx(found.never, abs=0.02)


def test_what_cannot_be_told_from_noise_turns_nothing_away():
    probes, losses = planted()
    losses = np.random.default_rng(1).normal(1.5, 1.0, losses.shape)
    losses[:, 1] = losses[:, [0, 2]].mean(axis=1)
    assert choose_abstention(probes, losses).rule.at == -0.25


def test_a_configured_step_is_kept_and_the_place_chosen_beside_it():
    found = choose_abstention(*planted(), widths=(0.0,))
    assert found.rule.width == 0
    assert found.rule.at == pytest.approx(0.3, abs=0.03)
    assert choose_abstention(*planted(), places=(0.7,)).rule.at == 0.7
