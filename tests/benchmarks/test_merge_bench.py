import pandas as pd
import pytest
import torch
from filelock import FileLock

from benchmarks.merge_bench import Bench, score_batch
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


def test_a_cell_that_another_process_measures_is_left_to_it(tmp_path):
    bench = Bench.__new__(Bench)
    bench.store = tmp_path
    made = []
    columns = {"split": ["test"], "nll": [1.0], "tokens": [1], "correct": [0.0]}
    bench.items = lambda adapters: made.append(adapters) or pd.DataFrame(columns)
    (tmp_path / "cells").mkdir()
    with FileLock(tmp_path / "cells" / "one.lock"):
        bench.measure("one", lambda: "adapter")
    assert not made
    for _ in range(2):
        bench.measure("one", lambda: "adapter")
    assert made == ["adapter"]
    assert pd.read_parquet(tmp_path / "cells" / "one.parquet")["method"].tolist() == ["one"]
