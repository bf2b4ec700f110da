"""Stages from adapters to merges, against the library's own functions on the same files."""

import json

import pandas as pd
import pytest
import torch

from tasks.merging import (
    Given,
    Rows,
    as_refitted,
    diagnose,
    explained_variance,
    factorise,
    find_rank,
    merge,
    refit,
    statistics,
    tune_scale,
)
from tclora.adapter import read_adapter
from tclora.config import SolverConfig
from tclora.merge import merge as merge_adapters
from tclora.tensor import LibraryFactors
from tests.tasks.conftest import cluster_row_files

SOLVER = SolverConfig(n_starts=1, n_iter=20)


@pytest.fixture
def rows(where, base):
    return Rows(base, cluster_row_files(where), 2, 256, 0)


def read(adapters):
    return [read_adapter(part.path, name) for name, part in adapters.items()]


def seen(adapters, rows, where):
    modules = tuple(read(adapters)[0].modules)
    found = statistics.fn(modules, {}, rows, where)
    own = statistics.fn(modules, adapters, rows, where)
    assert set(own.files) == set(found.files)
    assert own.files != found.files
    return statistics.fn(modules, {}, rows, where)


def same(one, other):
    return set(one.modules) == set(other.modules) and all(
        torch.allclose(one.modules[m].B @ one.modules[m].A, f.B @ f.A, atol=1e-5)
        for m, f in other.modules.items()
    )


def test_factors_have_the_rank_asked_for_at_most(adapters, where):
    found = factorise.fn(adapters, 4, SOLVER, 0, where)
    factors = LibraryFactors.load(found.path)
    assert factors.rank == found.info["rank"] == 4
    assert found.info["explained_variance"] == pytest.approx(factors.explained_variance)
    exact = factorise.fn(adapters, 100, SOLVER, 0, where)
    assert exact.info["rank"] == 9
    assert exact.info["explained_variance"] == pytest.approx(1)


def test_explained_variance_grows_with_the_rank(adapters, where):
    found = explained_variance.fn(adapters, (1, 3, 9), 0, where)
    shares = [found.metrics[f"factors/explained_variance_R{rank}"] for rank in (1, 3, 9)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert set(pd.read_parquet(found.path)["rank"]) == {1, 3, 9}


def test_interference_and_shared_energy_are_written(adapters, where):
    found = diagnose.fn(adapters, factorise.fn(adapters, 4, SOLVER, 0, where), where)
    assert [path.exists() for path in found.paths] == [True] * 3
    assert len(pd.read_parquet(where.layout.interference)) > 0
    modules = pd.read_parquet(where.layout.module_interference)
    assert len(modules) == 3 * modules["module"].nunique()  # pairs of three adapters
    assert 0 <= found.metrics["factors/shared_energy"] <= 1
    assert 1 <= found.metrics["factors/loading_spread"] <= 3
    assert 0 <= found.metrics["interference/input_angle"] <= 90


@pytest.mark.parametrize("method", ["uniform", "task-arithmetic"])
def test_a_merge_is_what_the_library_makes_of_the_same_adapters(adapters, where, method):
    options = {"scale": 0.3} if method == "task-arithmetic" else {}
    found = merge.fn(method, Given(adapters, None, None, None, 0), options, False, where)
    wanted = merge_adapters(read(adapters), method, **options)
    assert found.path == where.layout.merged(method)
    assert same(read_adapter(found.path), wanted.adapter)
    assert found.info["rank"] == 9
    assert ("tuned" in found.info["notes"]) is bool(options)


def test_statistics_inform_a_merge(adapters, where, rows):
    given = Given(adapters, None, seen(adapters, rows, where), 3, 0)
    found = merge.fn("regmean", given, {}, False, where)
    inputs = given.inputs()
    wanted = merge_adapters(read(adapters), "regmean", statistics=inputs.read_statistics(), rank=3)
    assert same(read_adapter(found.path), wanted.adapter)
    assert sorted(given.statistics.info["tokens"]) == sorted(adapters)


def test_a_tuned_scale_is_the_best_of_those_tried(adapters, where, rows):
    given = Given(adapters, None, None, None, 0)
    found = tune_scale.fn("task-arithmetic", given, (0.1, 0.5), (), rows, where)
    tried = json.loads(found.path.read_text())["losses"]
    assert {0.1, 0.5} <= {float(scale) for scale in tried}
    assert tried[str(found.info["scale"])] == min(tried.values())


def test_refitting_does_not_raise_the_loss(adapters, where, rows):
    given = Given(adapters, None, None, None, 0)
    merged = merge.fn("uniform", given, {}, True, where)
    assert merged.path == where.layout.merged("uniform-unrefitted")
    found = refit.fn("uniform", merged, 2, rows, where)
    assert found.path == where.layout.merged("uniform")
    assert min(found.info["losses"]) <= found.info["losses"][0]
    assert "refitted" in found.info["notes"]


def test_a_refitted_merge_tells_of_the_merge_it_was_made_of_now(adapters, where, rows):
    merged = merge.fn("uniform", Given(adapters, None, None, None, 0), {}, True, where)
    fitted = refit.fn("uniform", merged, 2, rows, where)
    told = merged.model_copy(update={"info": merged.info | {"notes": "new"}, "metrics": {"a": 1}})
    assert "new" not in str(refit.fn("uniform", told, 2, rows, where).info)  # of the same key
    found = as_refitted(fitted, told)
    assert found.info["notes"].startswith("new; component weights refitted")
    assert found.info["rank"] == merged.info["rank"]
    assert found.info["losses"] == fitted.info["losses"]
    assert (found.files, found.metrics) == (fitted.files, {"a": 1})


def test_the_smallest_rank_that_reaches_a_recovery(adapters, where, rows):
    given = Given(adapters, None, seen(adapters, rows, where), None, 0)
    found = find_rank.fn(given, "tc-lora", SOLVER, 0.0, rows, where)
    assert found.info["rank"] >= 1
    assert found.metrics
