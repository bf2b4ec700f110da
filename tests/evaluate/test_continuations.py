from contextlib import contextmanager

import pytest
import torch

from tclora.evaluate.continuations import Fork, likelihoods
from tclora.model.tokens import TokenRow
from tests.reference import row_nll

BUDGETS = (1, 60, 4096)
FORKS = (
    Fork((5, 6, 7), ((8,), (9,), (10,), (11,))),  # one token each
    Fork((5,), ((8, 9, 10), (8, 9), (8, 11, 12, 13), (8, 9, 10, 14))),  # some begin others
    Fork((20, 21, 22, 23, 24, 25, 26), ((30, 31), (32,), (33, 34, 35, 36, 37))),
    Fork((20, 21), ((30, 31, 32),)),  # one alone
    Fork((40, 41, 42, 43), ((50, 51), (50, 51), (52,))),  # one twice
    Fork((5, 6), ((8, 9), (8, 9, 10))),  # one ends within what all share
)


@torch.no_grad()
def greedy(model, fork, tokens):
    ids = torch.tensor([fork.prompt + tokens])
    best = model(ids).logits[0].argmax(-1)
    start = len(fork.prompt)
    return best[start - 1 : -1].tolist() == list(tokens)


@pytest.mark.parametrize("token_budget", BUDGETS)
def test_likelihoods_equal_whole_sequences(tiny_model, token_budget):
    found = likelihoods(tiny_model, FORKS, pad_id=0, token_budget=token_budget)
    for fork, values in zip(FORKS, found, strict=True):
        for tokens, value in zip(fork.continuations, values, strict=True):
            assert len(value.logprobs) == len(tokens)
            wanted = -row_nll(tiny_model, TokenRow(fork.prompt, tokens))
            assert value.total == pytest.approx(wanted, rel=1e-5)
            assert value.greedy == greedy(tiny_model, fork, tokens)


def test_the_greedy_continuation_is_found(tiny_model):
    prompt = (5, 6, 7)
    ids = torch.tensor([prompt])
    for _ in range(3):
        following = tiny_model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
    best = tuple(ids[0, 3:].tolist())
    other = (*best[:-1], best[-1] + 1)
    (found,) = likelihoods(tiny_model, [Fork(prompt, (best, other))], pad_id=0)
    assert [value.greedy for value in found] == [True, False]


def test_prompts_and_what_options_share_are_computed_once(tiny_model, monkeypatch):
    seen = []
    forward = tiny_model.forward

    def count(**inputs):
        seen.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(tiny_model, "forward", count)
    likelihoods(tiny_model, [Fork(tuple(range(4, 54)), ((8,), (9,), (10,)))], pad_id=0)
    assert seen == [50]  # options of one token need no second pass
    seen.clear()
    shared = ((60, 61, 8), (60, 61, 9, 10), (60, 61, 11))
    likelihoods(tiny_model, [Fork(tuple(range(4, 54)), shared)], pad_id=0)
    assert seen == [53]  # and of the second one token of its own


def test_every_row_of_every_pass_has_its_context(tiny_model):
    """A context that changes the model by row gives what each fork has alone in it."""
    shift = {0: 0.0, 1: 0.5, 2: -0.5, 3: 1.0, 4: 0.25, 5: -1.0}
    current = []

    def move(_, __, output):
        return output + torch.tensor([shift[i] for i in current[-1]])[:, None, None]

    tiny_model.model.layers[0].mlp.register_forward_hook(move)

    @contextmanager
    def context(rows):
        current.append(list(rows))
        yield
        current.pop()

    found = likelihoods(tiny_model, FORKS, pad_id=0, token_budget=60, context=context)
    for number, fork in enumerate(FORKS):
        alone = likelihoods(
            tiny_model, [fork], pad_id=0, context=lambda rows, n=number: context([n] * len(rows))
        )
        totals = [value.total for value in found[number]]
        assert totals == pytest.approx([value.total for value in alone[0]], rel=1e-4)


@pytest.mark.parametrize(
    "change", [{"sliding_window": 3}, {"layer_types": ["linear_attention"] * 2}]
)
def test_a_model_without_masks_of_ours_gets_whole_sequences(tiny_model, monkeypatch, change):
    wanted = likelihoods(tiny_model, FORKS, pad_id=0)
    passes = []
    forward = tiny_model.forward

    def watch(**inputs):
        passes.append(inputs["attention_mask"])
        return forward(**inputs)

    for name, value in change.items():
        monkeypatch.setattr(tiny_model.config, name, value, raising=False)
    monkeypatch.setattr(tiny_model, "forward", watch)
    found = likelihoods(tiny_model, FORKS, pad_id=0)
    for one, two in zip(found, wanted, strict=True):
        assert [v.total for v in one] == pytest.approx([v.total for v in two], rel=1e-5)
        assert [v.greedy for v in one] == [v.greedy for v in two]
    (mask,) = passes
    assert len(mask) == sum(len(set(fork.continuations)) for fork in FORKS)
    assert mask.ndim == 2
