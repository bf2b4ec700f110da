import pytest
import torch

from benchmarks.merge_bench import score_batch
from tclora.model.loss import response_nll
from tclora.model.tokens import TokenRow, batches


def greedy(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("budget", [1, 1000])
@torch.no_grad()
def test_a_row_is_right_where_greedy_decoding_gives_its_response(tiny_model, budget):
    prompts = [(5, 6, 7), (9, 10), (4, 8, 6, 5)]
    answers = [greedy(tiny_model, prompt, n) for prompt, n in zip(prompts, (3, 1, 5), strict=True)]
    wrong = (*answers[2][:-1], (answers[2][-1] + 1) % 20)
    rows = [TokenRow(p, a) for p, a in zip(prompts, (*answers[:2], wrong), strict=True)]
    found = {}
    for batch in batches(rows, pad_id=0, token_budget=budget):
        nll, right = score_batch(tiny_model, batch)
        torch.testing.assert_close(nll, response_nll(tiny_model, batch).sum(1))
        found |= dict(zip(batch.rows, right.tolist(), strict=True))
    assert found == {0: True, 1: True, 2: False}
