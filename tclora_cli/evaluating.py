"""``tclora eval``: everything is checked, then measured where it is not yet, then put in tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tasks.closure import Closure, closure
from tclora.config import LmEvalConfig, MeasureConfig
from tclora.data.tasks import TaskSettings, is_task_file, read_tasks
from tclora.errors import ConfigError
from tclora.evaluate.evaluation import Plan, Results, evaluate_target
from tclora.evaluate.lm_eval import executes_code
from tclora.evaluate.lm_eval_tasks import TaskConfig, check_lm_eval
from tclora.evaluate.scorers import check_leave
from tclora.evaluate.subjects import Adapted, Routed
from tclora.evaluate.tables import Tables, flat_figures, write_tables
from tclora.evaluate.targets import BaseChoice, Target, open_target
from tclora.jobs.call import Event
from tclora.library.names import OWN
from tclora.library.published import library_folder
from tclora.route import routers
from tclora_cli.tables import print_whole

_ONE_OF = {
    "template": ("chat", "plain"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
}
_LONGEST = 128  # an answer, in tokens
_COMPUTED = ("multiple_choice", "loglikelihood")  # output types of lm-eval without any generation


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of ``tclora eval``; see there."""

    target: str
    tasks: Sequence[str]
    methods: Sequence[str]
    adapters: Sequence[str]
    limits: Sequence[str]
    few_shot: int
    shown_from: Sequence[str]
    scorers: Sequence[str]
    generate: bool
    max_new_tokens: int | None
    token_budget: int
    allow_code: bool
    base: str | None
    template: str | None
    dtype: str | None
    track: bool
    seed: int
    output: Path


def run_evaluation(request: EvaluationRequest, console: Console) -> None:
    """Evaluate, print the tables and say where they are."""
    results = Results(request.output.absolute())
    target, plan = _prepare(request, results)

    def show(event: Event) -> None:
        what = "kept" if event.get("kept") else f"{event['rows']} of {event['of']} rows"
        console.print(f"{event['method']:<16}{event['task']:<24}{what}", highlight=False)

    tables = Tables.of(evaluate_target(target, plan, results, show), seed=request.seed)
    files = write_tables(tables, results.root)
    for title, table in tables.shown().items():
        print_whole(_terminal(title, table), console)
    console.print(f"{'results':<16}{results.root}", highlight=False, soft_wrap=True, markup=False)
    if request.track:
        _track(request, target, plan, tables, files, console)


def _prepare(request: EvaluationRequest, results: Results) -> tuple[Target, Plan]:
    """Check everything that files can tell, before a model is loaded."""
    for name, known in _ONE_OF.items():
        if (given := getattr(request, name)) not in (None, *known):
            raise ConfigError(f"--{name} must be one of {known}, got {given!r}")
    scorers = dict(_pair("--scorer", text) for text in request.scorers)
    limits = dict(_limit(text) for text in request.limits)
    files = [spec for spec in request.tasks if is_task_file(spec)]
    named = tuple(spec for spec in request.tasks if spec not in files)
    settings = TaskSettings(
        limits, request.few_shot, request.shown_from, scorers, request.seed, others=named
    )
    tasks = read_tasks(files, settings)
    _check_code(tasks, named, request.allow_code)
    choice = BaseChoice(request.base, request.template, request.dtype)
    adapters = dict(_pair("--adapter", text) for text in request.adapters)
    place = str(library_folder(request.target))
    target = open_target(place, results.embeddings, choice).with_adapters(adapters)
    methods = target.choose(request.methods)
    parts = check_lm_eval(named)
    _check_options(request, parts, alone=not files)
    _check_labels(tasks, parts)
    lm_eval = LmEvalConfig(
        lm_eval=named, lm_eval_limit=limits.get(""), allow_code_execution=request.allow_code
    )
    config = MeasureConfig(
        token_budget=request.token_budget,
        generate=request.generate,
        max_new_tokens=request.max_new_tokens or _LONGEST,
    )
    shown = request.few_shot or None
    return target, Plan(methods, tasks, lm_eval, config, measuring_code().digest, limits, shown)


def measuring_code() -> Closure:
    """Return the code that results depend on; it is the library that names a router."""
    return closure([open_target, evaluate_target, Adapted, Routed], given=routers)


def _check_options(
    request: EvaluationRequest, named: Mapping[str, Sequence[TaskConfig]], *, alone: bool
) -> None:
    """Refuse options that lm-eval's tasks cannot follow, rather than measure without them."""
    if not named:
        return
    if request.shown_from:
        raise ConfigError(_not_for(named, "--shots", "which shows rows of its own"))
    if request.template == "chat":
        raise ConfigError(_not_for(named, "--template chat", "whose prompts are plain text"))
    if alone and OWN in request.methods:
        raise ConfigError(
            f"--methods {OWN} must have a file of rows in --tasks, got lm-eval's alone "
            f"({', '.join(named)}), which need one model for all prompts; leave {OWN} out, or "
            "give a file"
        )
    fixed = [name for name, parts in named.items() if any(p.get("num_fewshot") == 0 for p in parts)]
    if request.few_shot and fixed:
        raise ConfigError(_not_for(fixed, "--few-shot", "which allows no rows to be shown"))
    texts = [
        name
        for name, parts in named.items()
        if any(part.get("output_type") not in _COMPUTED for part in parts)
    ]
    if texts and not request.generate:
        raise ConfigError(_not_for(texts, "--no-generate", "which scores generated answers"))
    if texts and request.max_new_tokens is not None:
        reason = "which says itself how long an answer may be"
        raise ConfigError(_not_for(texts, "--max-new-tokens", reason))


def _check_labels(
    tasks: Mapping[str, pd.DataFrame], named: Mapping[str, Sequence[TaskConfig]]
) -> None:
    """Refuse a label of two tasks, whose figures would be taken together."""
    owners = {
        str(label): f"the file {name!r}" for name, rows in tasks.items() for label in rows["task"]
    }
    for name, parts in named.items():
        own = {str(part.get("task")) for part in parts}
        if both := sorted(own & set(owners)):
            raise ConfigError(
                f"--tasks must name every task once, got {both[0]!r} from {owners[both[0]]} and "
                f"from lm-eval's {name!r}; evaluate one of the two by a command of its own"
            )
        owners |= dict.fromkeys(own, f"lm-eval's {name!r}")


def _not_for(tasks: Iterable[str], option: str, reason: str) -> str:
    return (
        f"{option} cannot be used with lm-eval's task {next(iter(tasks))!r}, {reason}; leave it "
        "out, or evaluate the task by a command of its own without it"
    )


def _pair(option: str, text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise ConfigError(f"{option} must be NAME=VALUE, got {text!r}")
    return name, value


def _limit(text: str) -> tuple[str, int]:
    task, _, number = text.rpartition("=")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--limit must be a number above 0 or TASK=NUMBER, got {text!r}")
    return task, int(number)


def _check_code(tasks: Mapping[str, pd.DataFrame], named: Sequence[str], allowed: bool) -> None:
    """Refuse to run what the model writes without leave."""
    remedy = "give --allow-code to let it"
    for rows in tasks.values():
        check_leave(rows["scorer"].unique(), allowed=allowed, remedy=remedy)
    running = [task for task in named if executes_code(task)]
    if running and not allowed:
        raise ConfigError(f"task {running[0]} runs code written by the model; {remedy}")


def _terminal(title: str, frame: pd.DataFrame) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column), no_wrap=column in {"task", "method", "n"})
    for row in frame.astype(str).to_numpy().tolist():
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def _track(
    request: EvaluationRequest,
    target: Target,
    plan: Plan,
    tables: Tables,
    files: Sequence[Path],
    console: Console,
) -> None:
    from tasks.datasets import dataset_of
    from tasks.tracking import log_evaluation

    params: dict[str, Any] = {name: str(value) for name, value in vars(request).items()}
    metrics = {
        f"{method}/{name}": value
        for method, rows in tables.summary.groupby("method", sort=False)
        for name, value in flat_figures(rows).items()
    }
    rows = [dataset_of(part, name, name, "evaluation") for name, part in plan.tasks.items()]
    output = request.output.parent.parent
    run = log_evaluation(output, target.name, params, metrics, files, rows)
    console.print(f"{'MLflow run':<16}{run.run_id} in {run.uri}", highlight=False, soft_wrap=True)
