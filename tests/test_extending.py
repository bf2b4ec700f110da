"""Variants from outside the package: the guide's examples, named by $TCLORA_PLUGINS."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tclora
from tclora.adapter import read_adapter
from tclora.cluster.registry import clusterers
from tclora.cluster.rows import cluster_rows
from tclora.config import AdapterConfig, ClusterConfig
from tclora.errors import ConfigError, LibraryError
from tclora.evaluate.scorers import Expected, score, scorers
from tclora.jobs.run import LocalExecutor
from tclora.merge import merge
from tclora.merge.registry import merge_methods
from tclora.model.base import Base
from tclora.registry import load_plugins
from tclora.route import fit_router, read_library, routers, write_library
from tclora.route.router import load_router, save_router
from tclora.train.engines import AdapterRequest, engines, train_adapters
from tclora.variants import variants
from tests.merge.examples import assert_same_updates, make_adapter
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import PROMPTS
from tests.route.test_router import blobs

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", GUIDE.read_text(), re.DOTALL))
ADDED = {
    ("merge method", "one-of-all"): "one adapter's own update, the others left out",
    ("router", "sharp"): "A mixture that leans to the nearest cluster: the square of softmax.",
    ("clusterer", "ward"): "Agglomerative clustering by Ward's criterion.",
    ("training engine", "pairs"): "Two adapters a job, one after the other on one process.",
    ("scorer", "starts"): "Compare the beginning of the text alone.",
}


@pytest.fixture
def registries(monkeypatch):
    """The registries as they are, and again afterwards."""
    for registry in (merge_methods, routers, clusterers, engines, scorers):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


@pytest.fixture
def plugins(registries, tmp_path, monkeypatch):
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name, code in EXAMPLES.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TCLORA_PLUGINS", ", ".join(EXAMPLES))


def test_the_guide_adds_one_of_each(plugins):
    before = set(variants())
    load_plugins()
    load_plugins()
    added = set(variants()) - before
    assert {(v.kind, v.name): v.summary for v in added} == ADDED
    assert {v.module for v in added} == set(EXAMPLES)
    assert all(v.module.startswith("tclora.") for v in before)


def test_every_registered_variant_has_a_summary():
    assert {v.kind for v in variants()} >= {kind for kind, _ in ADDED}
    assert [v for v in variants() if not v.summary or "\n" in v.summary] == []


def test_a_merge_method_from_outside_merges(plugins):
    load_plugins()
    parts = [make_adapter(name, seed=k) for k, name in enumerate("ab")]
    assert_same_updates(merge(parts, "one-of-all", index=1).adapter, parts[1])
    with pytest.raises(ValueError, match="option of one-of-all must be its own, got 'indx'"):
        merge(parts, "one-of-all", indx=1)


def test_a_router_from_outside_routes_and_comes_back(plugins, tmp_path):
    load_plugins()
    vectors, labels = blobs(spread=0.5)
    router = fit_router(vectors, labels, router="sharp", top_k=2)
    weights = router.route(vectors).weights
    soft = fit_router(vectors, labels, router="softmax", top_k=2).route(vectors).weights
    assert (weights.max(axis=1) > soft.max(axis=1) - 1e-6).all()
    assert weights.mean() == pytest.approx(1 / 3)
    save_router(router, tmp_path / "router.safetensors")
    assert (load_router(tmp_path / "router.safetensors").route(vectors).weights == weights).all()


def test_a_library_with_a_router_from_outside_needs_its_plugin(
    plugins, library, tmp_path, monkeypatch
):
    prompts = [own[0] for own in PROMPTS.values()]
    answers = tclora.load(library, router="sharp").generate(prompts, max_new_tokens=4)
    sharp = read_library(library, router="sharp")
    write_library(tmp_path / "sharp" / "routed", sharp.gated, sharp.router, sharp.info)
    found = tclora.load(tmp_path / "sharp").generate(prompts, max_new_tokens=4)
    assert [a.tokens for a in found] == [a.tokens for a in answers]
    monkeypatch.delitem(routers._entries, "sharp")
    with pytest.raises(LibraryError, match=r"'sharp' is registered by module 'my_router'"):
        read_library(tmp_path / "sharp")


def test_a_clusterer_from_outside_clusters(plugins):
    load_plugins()
    vectors, truth = blobs()
    config = ClusterConfig(method="ward", k=3, min_rows=1)
    found = cluster_rows(vectors, config)
    assert found.k == len(np.unique(truth)) == 3
    assert (found.assign(vectors) == found.labels).all()
    auto = config.model_copy(update={"k": "auto"})
    assert clusterers["ward"].check(auto) == ["cluster.k must be a number with ward"]


def test_an_engine_from_outside_trains_in_a_job(plugins, tmp_path, tiny_model_dir, monkeypatch):
    load_plugins()
    assert engines["pairs"].divide({"a": 3, "b": 5, "c": 4}, 2) == [["b", "c"], ["a"]]
    rows = pd.DataFrame({"prompt": ["say one", "say two"], "response": ["one", "two"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    paths = (str(tmp_path / "plugins"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    requests = [
        AdapterRequest(name=name, rows=tmp_path / "rows.parquet", target=tmp_path / name,
                       checkpoint=tmp_path / f"{name}-state")
        for name in "ab"
    ]  # fmt: skip
    base = Base(location=str(tiny_model_dir), digest="", dtype="float32", template="plain",
                max_tokens=64)  # fmt: skip
    config = AdapterConfig(r=2, target_modules=("q_proj",), max_steps=1)
    found = LocalExecutor().run_isolated(
        train_adapters, engine="pairs", base=base, requests=requests, config=config
    )
    assert [found[name].steps for name in "ab"] == [1, 1]
    assert_same_updates(read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b"))


def test_a_scorer_from_outside_scores(plugins):
    load_plugins()
    assert score("starts", " blue, I think", Expected("blue")) == 1
    assert score("starts", "not blue", Expected("blue")) == 0


def command_line(*arguments):
    command = [sys.executable, "-c", "from tclora_cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_knows_them(plugins, tmp_path, monkeypatch):
    paths = (str(tmp_path / "plugins"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    done = command_line("methods", "--json")
    assert "one-of-all" in [method["name"] for method in json.loads(done.stdout)]
    monkeypatch.setenv("TCLORA_PLUGINS", "no_such_module")
    done = command_line("config")
    assert done.returncode == 2
    assert done.stderr.startswith("error: plugin 'no_such_module'")


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv("TCLORA_PLUGINS", "no_such_module")
    with pytest.raises(ConfigError, match="plugin 'no_such_module'"):
        load_plugins()


def test_a_name_is_given_once(registries):
    for registry in (merge_methods, routers, clusterers):
        taken = next(iter(registry))
        with pytest.raises(ValueError, match=f"{registry.kind} name must be new, got '{taken}'"):
            registry.register(taken)
        with pytest.raises(ValueError, match=f"{registry.kind} must be registered, got 3"):
            registry.name_of(3)
