"""What a run does beside training gives on a GPU what it gives on a CPU."""

import pandas as pd
import pytest
import torch

from tclora.activations import collect
from tclora.adapter.union import module_names
from tclora.cluster.features.hidden import mean_states
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.scorers import CHOICES
from tclora.merge import merge
from tclora.model.attach import attached
from tclora.model.tokens import batches, encode
from tclora.tensor import factorise
from tclora.tune.components import fit_components, fit_loadings
from tclora.tune.scale import tune_scale
from tests.route.conftest import draw_adapters

PROMPTS = ["hi", "a much longer question, of many bytes", "?", "middle sized one"]
RESPONSES = ["yes", "n", "a longer answer than the others", "x y"]


@pytest.fixture
def rows(tokenizer):
    return encode(tokenizer, PROMPTS, RESPONSES, template="plain")


@pytest.fixture
def adapters(tiny_model):
    return draw_adapters(tiny_model, scale=0.15)


def assert_close(found, wanted, tolerance=1e-3):
    for module, factors in wanted.modules.items():
        one, two = found.modules[module].delta(), factors.delta()
        assert (one - two).norm() <= tolerance * two.norm()


def test_statistics_and_hidden_states(tiny_model, adapters, rows):
    modules = module_names(adapters)

    def measured():
        with attached(tiny_model, adapters[0]):
            found = collect(tiny_model, rows, "cluster-0", modules, pad_id=0, token_budget=80)
        states = [mean_states(tiny_model, batch) for batch in batches(rows, pad_id=0)]
        return found, states

    wanted, there = measured()
    tiny_model.to("cuda")
    found, here = measured()
    assert found.groups == wanted.groups
    for group, gram in wanted.grams["cluster-0"].items():
        assert (found.grams["cluster-0"][group] - gram).norm() <= 1e-4 * gram.norm()
    for one, two in zip(here, there, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_scales_and_refits(tiny_model, adapters, rows):
    parts = {a.name: rows[k : k + 2] for k, a in enumerate(adapters)}
    merged = merge(adapters, "svd").adapter
    factors = factorise(adapters, 4)

    def fitted():
        return (
            tune_scale(tiny_model, adapters, "ties", parts, densities=(0.2, 0.5)),
            fit_components(tiny_model, merged, rows, n_steps=4, learning_rate=0.02),
            fit_loadings(tiny_model, factors, rows, n_steps=4, learning_rate=0.02),
        )

    wanted = fitted()
    tiny_model.to("cuda")
    found = fitted()
    assert found[0].options == wanted[0].options
    for one, two in zip(found[1:], wanted[1:], strict=True):
        assert one.losses == pytest.approx(two.losses, rel=1e-3)
        assert_close(one.adapter, two.adapter)


def test_answers_choices_and_likelihoods(tiny_model, tokenizer):
    frame = pd.DataFrame({
        "id": [str(n) for n in range(6)],
        "prompt": [*PROMPTS, "Which?", "And now?"],
        "response": [*RESPONSES, "rose", "two words"],
        "answer": [*RESPONSES, "rose", "two words"],
        "scorer": ["exact"] * 4 + [CHOICES] * 2,
        "choices": [None] * 4 + [["rose", "sea", "a leaf"], ["one", "two words"]],
        "metadata": [{}] * 6,
    })  # fmt: skip
    options = {"template": "plain", "max_tokens": 200, "token_budget": 100, "max_new_tokens": 5}
    wanted = evaluate_frame(tiny_model, tokenizer, frame, **options)
    found = evaluate_frame(tiny_model.to("cuda"), tokenizer, frame, **options)
    assert found["nll"].tolist() == pytest.approx(wanted["nll"].tolist(), rel=1e-4)
    assert found["generated"].fillna("").tolist() == wanted["generated"].fillna("").tolist()
    assert found["correct"].tolist() == wanted["correct"].tolist()


def test_bases_in_half_precision_take_part_in_all_of_it(tiny_model, adapters, rows):
    merged = merge(adapters, "svd").adapter
    wanted = fit_components(tiny_model, merged, rows, n_steps=4, learning_rate=0.02)
    tiny_model.to("cuda", torch.bfloat16)
    found = fit_components(tiny_model, merged, rows, n_steps=4, learning_rate=0.02)
    assert found.losses == pytest.approx(wanted.losses, rel=2e-2)
    assert min(found.losses) < found.losses[0]
