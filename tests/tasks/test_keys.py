"""Keys of stages: what a stage really executes counts, and nothing else does.

One small run is followed call by call: every function of the project that a stage executes must be
in the closure its key is made of. Then definitions are changed in a copy of the source, one at a
time: the keys of the stages that reach them change, and no other key does.
"""

import ast
import random
import shutil
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
from prefect import flow
from prefect.context import TaskRunContext

from flows.context import Context
from flows.evaluate import evaluate
from flows.merge import merge
from flows.prepare import prepare
from flows.train import train
from tasks import evaluation, keys, merging, routing, training
from tasks import prepare as preparing
from tasks.closure import PROJECT, closure, find_source
from tasks.definitions import Symbol, parse
from tasks.keys import stage_key
from tasks.progress import JobProgress
from tasks.tracking import open_run
from tasks.where import Where
from tclora.config import load_config
from tclora.jobs.run import LocalExecutor
from tclora.library.layout import Layout
from tclora.preflight import check
from tests.flows.examples import alpaca_rows, write_rows
from tests.tasks.conftest import Inline

ROOT = Path(__file__).parents[2]


def parsed(module):
    file = find_source(module)
    return parse(module, file, file.stat().st_mtime_ns)


STAGES = {
    task.name: task
    for module in (preparing, training, merging, routing, evaluation)
    for task in vars(module).values()
    if isinstance(task, keys.Task)
}
# What receives figures or shows progress, finds keys or runs jobs; results do not depend on them.
ASIDE = (
    "tasks.tracking", "tasks.progress", "tasks.keys", "tasks.closure", "tasks.definitions",
    "tclora.config.", "tclora.jobs.run",
)  # fmt: skip


class Follower:
    """Notes which definitions of the project each stage executes."""

    def __init__(self):
        self.seen = {}
        self._modules = {}

    def __enter__(self):
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, _):
        if event != "call":
            return
        code = frame.f_code
        module = self._module(code.co_filename)
        context = None if not module or code.co_qualname.startswith("<") else TaskRunContext.get()
        if context and not self._module(frame.f_back.f_code.co_filename).startswith(ASIDE):
            symbol = self._symbol(module, code.co_qualname)
            self.seen.setdefault(context.task.name, set()).add(symbol)

    def _symbol(self, module, qualified):
        """The method that was called, where methods of its class count alone, or the definition."""
        name, _, rest = qualified.partition(".")
        method = rest.partition(".")[0]
        alone = method in parsed(module).methods.get(name, ())
        return Symbol(module, f"{name}.{method}" if alone else name)

    def _module(self, file):
        if file not in self._modules:
            path = Path(file)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PROJECT
            parts = path.relative_to(ROOT).with_suffix("").parts if inside else ()
            self._modules[file] = ".".join(p for p in parts if p != "__init__")
        return self._modules[file]


@pytest.fixture(scope="module")
def followed(tmp_path_factory, tiny_model_dir, prefect_server):
    folder = tmp_path_factory.mktemp("run")
    config = load_config(
        {
            "name": "mine", "output": str(folder / "runs"), "base_model": str(tiny_model_dir),
            "data": {"path": str(write_rows(folder, alpaca_rows())), "test_fraction": 0.2},
            "cluster": {"k": 2, "min_rows": 4, "method": "lora-parameters", "probe_shards": 2,
                        "probe_steps": 1},
            "train": {"r": 2, "batch_size": 8, "template": "plain", "dtype": "float32",
                      "target_modules": ["q_proj"], "max_steps": 2},
            "factorise": {"rank": 2, "ranks": [1], "n_starts": 1, "n_iter": 5,
                          "target_recovery": 0.01},
            "evaluate": {"max_new_tokens": 2, "resamples": 10, "cross_rows": 2},
            "merge": {"methods": ["tc-lora", "task-arithmetic"], "scales": [0.5, 1.0],
                      "refit_steps": 1},
        }
    )  # fmt: skip
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        models = check(config)
        where = Where(
            Layout(folder / "staging"), open_run(config, "followed", {}), Inline(), JobProgress()
        )
        context = Context(config, models, where)

        def note(stage, inputs):
            arguments[stage.name] = dict(inputs)
            return stage_key(stage, inputs)

        patch.setattr(keys, "stage_key", note)

        @flow(validate_parameters=False)
        def all_stages():
            prepared = prepare(context)
            trained = train(context, prepared)
            merged = merge(context, prepared, trained)
            evaluate(context, prepared, trained, merged, {})

        with Follower() as follower:
            all_stages()
    return follower.seen, arguments


def test_every_stage_was_followed(followed):
    seen, arguments = followed
    assert set(seen) == set(arguments) == set(STAGES)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_what_a_stage_executes_is_in_its_closure(followed, name):
    seen, arguments = followed
    found = closure([STAGES[name].fn], set(keys._strings(arguments[name]))).definitions
    executed = {s for s in seen[name] if not s.module.startswith(ASIDE)}
    assert executed - set(found) == set()
    assert len(executed) > 1


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the project's source, and how to find modules in it."""
    folder = tmp_path_factory.mktemp("source")
    for package in PROJECT:
        shutil.copytree(ROOT / package, folder / package)

    def find(module):
        source = find_source(module)
        return folder / source.relative_to(ROOT) if source else None

    return find


def definitions_of(arguments, find=find_source):
    return {
        name: closure([task.fn], set(keys._strings(arguments[name])), find)
        for name, task in STAGES.items()
    }


def test_a_changed_definition_changes_the_keys_of_the_stages_that_reach_it(followed, copied):
    _, arguments = followed
    before = definitions_of(arguments, copied)
    functions = sorted(
        {s for found in before.values() for s in found.definitions if _is_function(s, copied)}
    )
    methods = [symbol for symbol in functions if "." in symbol.name]
    chosen = random.Random(0).sample(functions, 12) + random.Random(0).sample(methods, 6)
    for symbol in chosen:
        file = copied(symbol.module)
        text = file.read_text()
        file.write_text(_with_one_more_statement(text, symbol.name))
        after = definitions_of(arguments, copied)
        file.write_text(text)
        reached = {name for name, found in before.items() if symbol in found.definitions}
        changed = {name for name in before if before[name].digest != after[name].digest}
        assert changed == reached, symbol


def _is_function(symbol, find):
    file = find(symbol.module)
    return file is not None and _function(_tree(file.read_text()), symbol.name) is not None


_tree = cache(ast.parse)


def _function(tree, name):
    """The function, or the method for Class.method."""
    *classes, name = name.split(".")
    body = tree.body
    for kind in classes:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == kind).body
    return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _with_one_more_statement(text, name):
    tree = ast.parse(text)
    _function(tree, name).body.append(ast.Expr(ast.Constant(0)))
    return ast.unparse(tree)


@pytest.mark.parametrize("module", ["tclora.report.render", "tclora.serve.app", "tasks.publishing"])
def test_what_no_stage_executes_changes_no_key(followed, copied, module):
    _, arguments = followed
    before = definitions_of(arguments, copied)
    file = copied(module)
    text = file.read_text()
    file.write_text(text.replace("return ", "return 0 or "))
    after = definitions_of(arguments, copied)
    file.write_text(text)
    assert {n: f.digest for n, f in before.items()} == {n: f.digest for n, f in after.items()}


def test_a_new_path_in_the_layout_changes_no_key(followed, copied):
    _, arguments = followed
    before = definitions_of(arguments, copied)
    file = copied("tclora.library.layout")
    text = file.read_text()
    new = "    @property\n    def brand_new(self):\n        return self.root / 'brand_new'\n\n"
    assert "    def name(self" in text
    file.write_text(text.replace("    def name(self", f"{new}    def name(self"))
    after = definitions_of(arguments, copied)
    file.write_text(text)
    assert {n: f.digest for n, f in before.items()} == {n: f.digest for n, f in after.items()}


def test_values_count_and_where_it_is_shown_and_runs_does_not(followed):
    _, arguments = followed
    train, given = STAGES["train"], arguments["train"]
    key = stage_key(train, given)
    assert stage_key(train, given | {"seed": 9}) != key
    where = given["where"]
    shown = Where(where.layout, where.run, where.executor, JobProgress())
    assert stage_key(train, given | {"where": shown}) == key
    elsewhere = Where(
        Layout(where.layout.root / "other"), where.run, where.executor, where.progress
    )
    assert stage_key(train, given | {"where": elsewhere}) != key
    other = Where(where.layout, where.run, LocalExecutor(), where.progress)
    assert (
        stage_key(train, given | {"where": other}) == key
    )  # it carries the job, and files by digest
    with pytest.raises(TypeError, match="must be JSON, a path or a model"):
        stage_key(train, given | {"seed": object()})
