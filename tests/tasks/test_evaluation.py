"""Stages that measure, and the summary of all methods."""

import pandas as pd
import pytest

from flows.evaluate import lm_eval_for
from tasks.evaluation import Measured, cross, evaluate, summarise_items
from tasks.merging import diagnose, factorise
from tclora.config import EvaluateConfig, IntervalConfig, MeasureConfig, SolverConfig
from tclora.evaluate.subjects import ALL
from tclora.library.names import BASE, OWN
from tests.tasks.conftest import write_rows

MEASURE = MeasureConfig(max_new_tokens=2)
SOLVER = SolverConfig(n_starts=1, n_iter=5)


@pytest.fixture
def held_out(where):
    rows = [(f"say {i}", "abc"[i % 3] * 3) for i in range(6)]
    answers = [response for _, response in rows]
    return write_rows(
        where, "evaluation", rows, id=[str(i) for i in range(6)], answer=answers, scorer="exact",
        metadata=None, split="test", task="say", cluster=[i % 3 for i in range(6)],
    )  # fmt: skip


def measure(method, adapters, held_out, base, where):
    return evaluate.fn(method, held_out, adapters, MEASURE, None, base, where)


def test_methods_are_measured_row_by_row_and_summed_up(adapters, where, base, held_out):
    own = {str(k): part for k, part in enumerate(adapters.values())}
    merged = {ALL: adapters["cluster-0"]}
    items = {
        name: measure(name, parts, held_out, base, where)
        for name, parts in {BASE: {}, OWN: own, "uniform": merged}.items()
    }
    table = pd.concat([pd.read_parquet(part.path) for part in items.values()])
    assert table.groupby("method").size().to_dict() == {BASE: 6, OWN: 6, "uniform": 6}
    first = table[table["cluster"] == 0].pivot(index="id", columns="method", values="nll")
    assert first[OWN].tolist() == pytest.approx(first["uniform"].tolist(), rel=1e-5)
    crossed = cross.fn(held_out, adapters, 1, 0, MEASURE, base, where)
    diagnosis = diagnose.fn(adapters, factorise.fn(adapters, 2, SOLVER, 0, where), where)
    measured = Measured(items, {}, 0)
    intervals = IntervalConfig(resamples=20)
    found = summarise_items.fn(measured, crossed, diagnosis, intervals, 0, where)
    written = {path.name for path in found.paths}
    assert {"items.parquet", "summary.parquet", "recovery.parquet", "cross.parquet"} <= written
    recovered = pd.read_parquet(where.layout.evaluation.recovery)
    assert "uniform" in set(recovered["method"])
    harm = pd.read_parquet(where.layout.evaluation.table("harm")).set_index("measure")
    assert (harm["n"] == 6).all()  # ordered pairs of three clusters
    assert "interference/harm" in found.metrics


def test_what_lm_eval_is_told_counts_only_where_it_is_asked(adapters):
    one = {ALL: adapters["cluster-0"]}
    own = {str(k): part for k, part in enumerate(adapters.values())}
    assert lm_eval_for(one, EvaluateConfig(allow_code_execution=True)) is None
    asked = EvaluateConfig(lm_eval=("piqa",), lm_eval_limit=3)
    assert lm_eval_for(own, asked) is None
    assert [lm_eval_for(part, asked).lm_eval_limit for part in (one, {})] == [3, 3]


def test_choices_that_rows_bring_reach_the_summary(adapters, where, base):
    rows = [(f"which, {i}?", "abc"[i % 3] * 3) for i in range(6)]
    held_out = write_rows(
        where, "evaluation", rows, id=[str(i) for i in range(6)], answer=[r for _, r in rows],
        scorer="choices", metadata=None, split="test", task="which", cluster=[0, 1, 2] * 2,
        choices=[["aaa", "bbb", "ccc"]] * 6,
    )  # fmt: skip
    own = {str(k): part for k, part in enumerate(adapters.values())}
    items = {name: measure(name, parts, held_out, base, where)
             for name, parts in {BASE: {}, OWN: own}.items()}  # fmt: skip
    diagnosis = diagnose.fn(adapters, factorise.fn(adapters, 2, SOLVER, 0, where), where)
    measured, intervals = Measured(items, {}, 0), IntervalConfig(resamples=20)
    found = summarise_items.fn(measured, None, diagnosis, intervals, 0, where)
    table = pd.read_parquet(where.layout.evaluation.items)
    assert [len(values) for values in table["logprobs"]] == [3] * 12
    assert table["generated"].isna().all()
    summary = pd.read_parquet(next(p for p in found.paths if p == where.layout.evaluation.summary))
    whole = summary[summary["group_kind"] == "all"].set_index("method")
    for method in (BASE, OWN):
        mine = table[table["method"] == method]
        assert whole["accuracy"][method] == pytest.approx(mine["correct"].mean())
        assert whole["accuracy_norm"][method] == pytest.approx(mine["correct_norm"].mean())
