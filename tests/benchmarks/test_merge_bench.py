import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from merge_bench import Bench
from merge_scoring import Routed, score_part

from tclora.merge import merge
from tclora.model.base import Base
from tclora.model.loss import response_nll
from tclora.model.reading import Packed, Padded
from tclora.model.tokens import TokenRow, batches
from tclora.route import Fallback, Routing, fit_gates
from tests.route.conftest import draw_adapters


def greedy(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("kind", [Packed, Padded])
@torch.no_grad()
def test_a_row_is_right_where_greedy_decoding_gives_its_response(tiny_model, budget, kind):
    prompts = [(5, 6, 7), (9, 10), (4, 8, 6, 5)]
    answers = [greedy(tiny_model, prompt, n) for prompt, n in zip(prompts, (3, 1, 5), strict=True)]
    wrong = (*answers[2][:-1], (answers[2][-1] + 1) % 20)
    rows = [TokenRow(p, a) for p, a in zip(prompts, (*answers[:2], wrong), strict=True)]
    read, plain = kind(tiny_model), {}
    for batch in batches(rows, pad_id=0, token_budget=1000):
        plain |= dict(zip(batch.rows, response_nll(tiny_model, batch).sum(1), strict=True))
    found = {}
    with read.ready():
        for part in read.parts(rows, budget):
            nll, right = score_part(tiny_model, part)
            torch.testing.assert_close(nll, torch.stack([plain[row] for row in part.rows]))
            found |= dict(zip(part.rows, right.tolist(), strict=True))
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


@pytest.mark.parametrize("kind", [Packed, Padded])
def test_routed_rows_are_measured_under_their_own_gates(tiny_model_dir, tiny_model, kind):
    """Every row's figures are those under the plain adapter that its routing amounts to."""
    bench = Bench.__new__(Bench)
    bench.choices, bench.budget = True, 100
    bench.loaded = Base(
        location=str(tiny_model_dir), digest="", dtype="float32", template="plain", max_tokens=64
    ).load()
    bench.model = bench.loaded.model
    bench.reader = kind(bench.model)
    rows = pd.DataFrame({
        "id": ["a", "b", "c", "d"], "split": ["test", "test", "ood", "test"], "task": "any",
        "cluster": [2, 0, 1, 1], "prompt": ["Add 1 and 2.", "Go", "Is it so?", "Say a word."],
        "response": ["3", "left", "yes", "house"], "choices": [None, None, ["yes", "no"], None],
    })  # fmt: skip
    bench.use(rows)
    adapters = draw_adapters(tiny_model)
    merged = merge(adapters, "tc-lora-mean", rank=9).adapter
    gated = fit_gates(adapters, merged, fallback=Fallback(1.0, 0.5))
    shares = np.array([1, 0.4, 1, 0], "float32")
    routing = Routing(
        np.eye(3, dtype="float32")[rows["cluster"]], shares > 0, shares, belonging=shares
    )
    found = bench.items(Routed(gated, routing))
    for n, (k, share) in enumerate(zip(rows["cluster"], shares.tolist(), strict=True)):
        gates = {m: torch.lerp(gated.elsewhere(m), own[k].double(), share)
                 for m, own in gated.gates.items()}  # fmt: skip
        wanted = bench.items(gated._plain(gates, "one")).loc[n]
        assert found.loc[n, "nll"] == pytest.approx(wanted["nll"], rel=1e-4)
        assert found.loc[n, "correct"] == wanted["correct"]
    assert not np.allclose(found["nll"], bench.items(merged)["nll"], rtol=0.01)
