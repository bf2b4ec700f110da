import math

import pandas as pd
import pytest
import torch
from transformers import GenerationConfig

from tclora.evaluate.measure import evaluate_frame, measure
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches, encode
from tests.reference import row_answer, row_nll

BUDGETS = (1, 40, 4096)


@pytest.fixture
def rows(tokenizer):
    prompts = ["hi", "a much longer question, of many bytes", "?", "größe", "middle sized one"]
    responses = ["yes", "n", "a longer answer than the others", "", "x y"]
    rows = encode(tokenizer, prompts, responses, template="plain")
    assert len({len(row.prompt) for row in rows}) == len(rows)  # so that padding matters
    return rows


@pytest.mark.parametrize("token_budget", BUDGETS)
def test_response_nll_equals_the_unbatched_reference(tiny_model, rows, token_budget):
    wanted = [row_nll(tiny_model, row) for row in rows]
    found = {}
    for batch in batches(rows, pad_id=0, token_budget=token_budget):
        with torch.no_grad():
            nll = response_nll(tiny_model, batch)
        assert nll.dtype == torch.float32
        assert (nll != 0).sum() == batch.supervised
        found |= dict(zip(batch.rows, nll.sum(1).tolist(), strict=True))
    assert [found[i] for i in range(len(rows))] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("token_budget", BUDGETS)
@pytest.mark.parametrize("max_new_tokens", [None, 1, 12])
def test_measure_equals_the_reference(tiny_model, tokenizer, rows, token_budget, max_new_tokens):
    found = measure(
        tiny_model, tokenizer, rows, token_budget=token_budget, max_new_tokens=max_new_tokens
    )
    wanted = [row_nll(tiny_model, row) for row in rows]
    assert [m.nll for m in found] == pytest.approx(wanted, rel=1e-5)
    assert [m.tokens for m in found] == [len(row.response) for row in rows]
    if max_new_tokens is None:
        assert {m.generated for m in found} == {None}
    else:
        answers = [row_answer(tiny_model, tokenizer, row, max_new_tokens) for row in rows]
        assert [m.generated for m in found] == answers


def test_greedy_answers_equal_generate_on_single_rows(tiny_model, tokenizer, rows):
    found = measure(tiny_model, tokenizer, rows, max_new_tokens=10)
    for row, measured in zip(rows, found, strict=True):
        ids = torch.tensor([row.prompt])
        out = tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert measured.generated == text


def test_defaults_of_the_checkpoint_change_no_answer(tiny_model, tokenizer, rows):
    wanted = [row_answer(tiny_model, tokenizer, row, 10) for row in rows]
    before = GenerationConfig(repetition_penalty=5.0, min_new_tokens=10, eos_token_id=[2, 40])
    tiny_model.generation_config = before
    ended = [
        measured.generated for measured in measure(tiny_model, tokenizer, rows, max_new_tokens=10)
    ]
    assert all(whole.startswith(answer) for whole, answer in zip(wanted, ended, strict=True))
    before.eos_token_id = tokenizer.eos_token_id
    found = measure(tiny_model, tokenizer, rows, max_new_tokens=10)
    assert [measured.generated for measured in found] == wanted
    assert tiny_model.generation_config is before


def test_an_early_end_does_not_disturb_the_nll(tiny_model, tokenizer, rows):
    """Where the model ends some answers at once, the cache still holds their prompts."""
    with torch.no_grad():  # a strong pull to the end-of-sequence token for some of the rows
        tiny_model.lm_head.weight[tokenizer.eos_token_id] *= 6
    found = measure(tiny_model, tokenizer, rows, max_new_tokens=16)
    answers = [row_answer(tiny_model, tokenizer, row, 16) for row in rows]
    assert len({len(answer) for answer in answers}) > 1
    assert [m.generated for m in found] == answers
    assert [m.nll for m in found] == pytest.approx(
        [row_nll(tiny_model, row) for row in rows], rel=1e-5
    )


def test_a_prompt_of_one_token(tiny_model, tokenizer):
    rows = [TokenRow((9,), (10, 1)), TokenRow((8, 7, 6), (1,))]
    found = measure(tiny_model, tokenizer, rows, max_new_tokens=3)
    wanted = [row_nll(tiny_model, row) for row in rows]
    assert [m.nll for m in found] == pytest.approx(wanted, rel=1e-5)


def frame_of(prompts, responses, **columns):
    frame = pd.DataFrame({"prompt": prompts, "response": responses, "answer": responses})
    ids = [f"id{i}" for i in range(len(prompts))]
    return frame.assign(**{"id": ids, "scorer": "exact", "metadata": None} | columns)


def test_a_frame_is_measured_row_by_row_and_scored(tiny_model, tokenizer):
    options = {"template": "plain", "max_tokens": 64, "token_budget": 50}
    frame = frame_of(["one", "a longer one", "two"], ["x", "yy", "z"])
    plain = evaluate_frame(tiny_model, tokenizer, frame, max_new_tokens=None, **options)
    assert plain["id"].tolist() == ["id0", "id1", "id2"]
    assert plain["correct"].isna().all()
    assert plain["generated"].isna().all()
    scored = evaluate_frame(tiny_model, tokenizer, frame, max_new_tokens=4, **options)
    assert scored["nll"].tolist() == pytest.approx(plain["nll"].tolist(), rel=1e-5)
    assert scored["correct"].tolist() == [0.0, 0.0, 0.0]
    # What the model says, made the expected answer, is right.
    right = frame.assign(answer=scored["generated"])
    again = evaluate_frame(tiny_model, tokenizer, right, max_new_tokens=4, **options)
    assert again["correct"].tolist() == [1.0, 1.0, 1.0]


def test_the_index_of_the_frame_does_not_matter(tiny_model, tokenizer):
    options = {
        "template": "chat", "max_tokens": 64, "token_budget": 50, "max_new_tokens": None,
    }  # fmt: skip
    frame = frame_of(["one", "a longer one", "two"], ["x", "yy", "z"])
    wanted = evaluate_frame(tiny_model, tokenizer, frame, **options)
    shifted = frame.set_axis([7, 7, 3], axis=0)
    pd.testing.assert_frame_equal(evaluate_frame(tiny_model, tokenizer, shifted, **options), wanted)


def test_a_truncated_prompt_still_measures_the_whole_response(tiny_model, tokenizer):
    (row,) = encode(tokenizer, ["p" * 90], ["answer"], template="plain", max_tokens=20)
    (found,) = measure(tiny_model, tokenizer, [row])
    assert found.tokens == len("answer") + 1
    assert math.isclose(found.nll, row_nll(tiny_model, row), rel_tol=1e-5)
