"""Evaluating a target on tasks; a method and a task are measured once, as long as nothing changes.

A result is kept under a digest of base model, method, rows and settings, so that a run that was
killed goes on, a second one measures nothing, and two libraries share what they have in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.errors import ConfigError
from tclora.evaluate.lm_eval import YAML
from tclora.evaluate.lm_eval_tasks import written_task
from tclora.evaluate.method import with_labels
from tclora.evaluate.subjects import Subject, opened
from tclora.evaluate.targets import BY_CLUSTER, Method, Target
from tclora.files import atomic_path, sha256_json
from tclora.jobs.call import EventCallback
from tclora.library.names import OWN
from tclora.model.base import Base
from tclora.model.locate import choose_dtype, default_device

_MEASURED = ("id", "prompt", "response", "answer", "scorer", "metadata", "choices", "shots", "task")


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes
    ----------
    methods : sequence of Method
    tasks : mapping
        Name → canonical rows.
    lm_eval : LmEvalConfig
        lm-eval's tasks, each a task of its own.
    config : MeasureConfig
        What is measured on every row.
    code : str
        Digest of the code that measures; results of other code are not used.
    lm_eval_limits : mapping
        lm-eval's task → its items, in place of those of `lm_eval`.
    lm_eval_few_shot : int, optional
        Rows that lm-eval shows before each prompt, in place of what its tasks say.
    """

    methods: Sequence[Method]
    tasks: Mapping[str, pd.DataFrame]
    lm_eval: LmEvalConfig
    config: MeasureConfig
    code: str
    lm_eval_limits: Mapping[str, int] = field(default_factory=dict)
    lm_eval_few_shot: int | None = None

    def asked(self, name: str) -> LmEvalConfig:
        """Return what is asked of one of lm-eval's tasks."""
        limit = self.lm_eval_limits.get(name, self.lm_eval.lm_eval_limit)
        return self.lm_eval.model_copy(update={"lm_eval": (name,), "lm_eval_limit": limit})


@dataclass(frozen=True)
class Results:
    """Measured items on disk, one Parquet file per method and task.

    Attributes
    ----------
    root : Path
        Folder of an evaluation's results.
    """

    root: Path

    @property
    def embeddings(self) -> Path:
        """Folder of the prompts' embeddings."""
        return self.root / "prompts"

    def measured(self, key: str) -> Path:
        """File of one method's measurements on one task."""
        return self.root / "measured" / f"{key}.parquet"

    def read(self, key: str) -> pd.DataFrame:
        """Return what was measured."""
        return pd.read_parquet(self.measured(key))

    def write(self, key: str, items: pd.DataFrame) -> None:
        """Keep what was measured."""
        with atomic_path(self.measured(key)) as fresh:
            items.to_parquet(fresh)


def evaluate_target(
    target: Target, plan: Plan, results: Results, on_event: EventCallback = lambda _: None
) -> pd.DataFrame:
    """Measure what is not measured yet; return all items.

    Parameters
    ----------
    target : Target
        What is evaluated.
    plan : Plan
        Methods, tasks and settings.
    results : Results
        Where results are kept and found.
    on_event : callable
        Called with method, task, ``rows`` and ``of``, ``kept`` for what was measured before.

    Returns
    -------
    DataFrame
        Columns method, task, split, cluster, skills and those of
        `tclora.evaluate.measure.evaluate_frame`.

    Raises
    ------
    ConfigError
        If a file of rows has the name of one of lm-eval's tasks.
    """
    if both := sorted(set(plan.tasks) & set(plan.lm_eval.lm_eval)):
        raise ConfigError(
            f"tasks must have names of their own, got a file of rows {both[0]!r} and lm-eval's "
            f"task {both[0]!r}; rename the file"
        )
    clusters = any(method.name in BY_CLUSTER for method in plan.methods)
    tasks = {name: _labelled(target, rows, clusters) for name, rows in plan.tasks.items()}
    keys = {
        (method.name, name): _key(target.base, method, rows, plan)
        for method in plan.methods
        for name, rows in tasks.items()
    }
    keys |= {
        (method.name, name): _key(target.base, method, name, plan)
        for method in plan.methods
        for name in plan.lm_eval.lm_eval
        if method.name != OWN  # an adapter per cluster is no model lm-eval could be given
    }
    pending = {pair: key for pair, key in keys.items() if not results.measured(key).is_file()}
    for pair in keys:
        if pair not in pending:
            on_event({"method": pair[0], "task": pair[1], "kept": True})
    loaded = target.base.load() if pending else None
    for method in plan.methods:
        todo = {name: key for (other, name), key in pending.items() if other == method.name}
        if todo and loaded:
            with opened(method.open(loaded)) as subject:
                for name, key in todo.items():
                    told = _told(on_event, method.name, name)
                    results.write(key, _measure(subject, name, tasks.get(name), plan, told))
    parts = [
        _labelled_items(target, results.read(key), tasks.get(name)).assign(method=method_name)
        for (method_name, name), key in keys.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _told(on_event: EventCallback, method: str, task: str) -> EventCallback:
    return lambda event: on_event({"method": method, "task": task, **event})


def _labelled_items(target: Target, items: pd.DataFrame, rows: pd.DataFrame | None) -> pd.DataFrame:
    """Return items with what is known of them now, which may be more than when they were kept."""
    if rows is not None:
        return with_labels(items, rows)
    # Where a task has several filters, its items name theirs behind it, but their ids do not.
    task = items["id"].str.rpartition("-")[0]
    known = _labelled(target, pd.DataFrame({"task": task, "split": None}), clusters=False)
    return items.assign(split=known["split"], cluster=None)


def _labelled(target: Target, rows: pd.DataFrame, clusters: bool) -> pd.DataFrame:
    """Return rows with their splits; without a library no task was trained on that anyone knows of.

    There rows are out of domain ("ood") unless they name a split themselves.
    """
    if target.places:
        return target.places.label(rows, clusters=clusters)
    return rows.assign(split=rows["split"].fillna("ood"), cluster=None)


def _measure(
    subject: Subject,
    name: str,
    rows: pd.DataFrame | None,
    plan: Plan,
    on_event: EventCallback,
) -> pd.DataFrame:
    if rows is not None:
        return subject.measure(rows, plan.config, on_event)
    options = (plan.asked(name), plan.config.token_budget, plan.lm_eval_few_shot)
    items = subject.run_lm_eval(*options).items
    on_event({"rows": len(items), "of": len(items)})
    return items.assign(nll=float("nan"), tokens=0)


def _key(base: Base, method: Method, rows: pd.DataFrame | str, plan: Plan) -> str:
    """Return the digest of all that a result depends on."""
    settings = plan.config.model_dump(exclude={"token_budget"})
    if isinstance(rows, str):
        task: object = _lm_eval_task(rows, plan)
    else:
        columns = [name for name in _MEASURED if name in rows]
        if method.name in BY_CLUSTER:
            columns += ["cluster"]
        task = rows[columns].to_dict("records")
    dtype = str(choose_dtype(base.dtype, default_device()))
    model = [base.digest, base.template, base.max_tokens, dtype]
    return sha256_json([model, method.digest, task, settings, plan.code])


def _lm_eval_task(name: str, plan: Plan) -> list[object]:
    """Return what one of lm-eval's tasks is: lm-eval's version, and of a file what it says."""
    written = written_task(Path(name)) if name.endswith(YAML) else None
    asked = plan.asked(name).model_dump()
    return [asked, plan.lm_eval_few_shot, written, version("lm_eval")]
