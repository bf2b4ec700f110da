"""Cached stages: a Prefect task whose key is all that determines its result.

The key of a stage is made of the values it is given, the digests of its inputs and the source of
all it can execute: the body of the task, the functions it calls or runs elsewhere, what they call,
and where it runs jobs also the worker. `Where` tells a stage where to work and is left out, except
for the folder; so an executor, which carries files by their digests, does not count (ADR 15).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from pydantic import BaseModel

from tasks.artifact import Artifact
from tasks.closure import closure
from tasks.shared import Result, Shared
from tasks.where import Where
from tclora.files import sha256_json
from tclora.jobs import worker
from tclora.jobs.call import Call

P = ParamSpec("P")
R = TypeVar("R")
_ISOLATED = "run_isolated"


@dataclass
class StageKey(CachePolicy):
    """Values, digests of inputs, and source: see the module."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,  # noqa: ANN401
    ) -> str:
        """Return the key of one run of a stage."""
        return stage_key(task_ctx.task, inputs)


def stage(name: str, run_name: str | None = None) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a cached Prefect task of a function that returns an `Artifact` or several.

    Parameters
    ----------
    name : str
        Name of the stage.
    run_name : str, optional
        Name of its runs, such as "merge-{method}".
    """

    def wrap(function: Callable[P, R]) -> Task[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature(function).bind(*args, **kwargs).arguments
            return _shared(made, given, lambda: function(*args, **kwargs))

        made = task(
            name=name,
            task_run_name=run_name,
            cache_policy=StageKey(),
            persist_result=True,
            result_serializer="json",
        )(run)
        return made

    return wrap


def _shared(stage: Task[..., Any], inputs: Mapping[str, Any], run: Callable[[], R]) -> R:
    """Run a stage, or take over what another run that shares with this one has made."""
    where = next((value for value in inputs.values() if isinstance(value, Where)), None)
    if where is None or not where.shared:
        return run()
    key = stage_key(stage, inputs, placed=False)
    found = next(filter(None, (_taken(s, stage, key, where) for s in where.shared)), None)
    result: Any = run() if found is None else found[0]
    for shared in where.shared:
        if found is None or shared is not found[1]:
            _recorded(shared, stage, key, result)
    return result  # type: ignore[no-any-return]


def _taken(
    shared: Shared, stage: Task[..., Any], key: str, where: Where
) -> tuple[Result, Shared] | None:
    """Return what another run has left, and where; None where there is nothing."""
    try:
        found = shared.take_over(key, where.layout.root)
    except shared.failures as error:
        get_run_logger().warning("%s: nothing is taken over: %s", stage.name, error)
        return None
    if found is None:
        return None
    get_run_logger().info("%s: taken over from another run", stage.name)
    return found, shared


def _recorded(shared: Shared, stage: Task[..., Any], key: str, result: Result) -> None:
    """Leave what a stage has made for others; it is made whether that works or not."""
    try:
        shared.record(key, result)
    except shared.failures as error:
        message = "%s: what it has made is not kept for a run on another machine: %s"
        get_run_logger().warning(message, stage.name, error)


def stage_key(stage: Task[..., Any], inputs: Mapping[str, Any], *, placed: bool = True) -> str:
    """Return the key of a stage for its arguments; one for any folder if not `placed`."""
    values = {name: _identity(value, placed) for name, value in sorted(inputs.items())}
    given = set(_strings(values))
    source = closure([stage.fn], given)
    if _ISOLATED in source.names:
        source = closure([stage.fn, worker.main], given)
    return sha256_json([stage.name, values, source.digest])


def current_key() -> str:
    """Return the key of the stage that is running, for names of what must not be mixed up."""
    context = _context()
    return stage_key(context.task, context.parameters)


def current_name() -> str:
    """Return the name that Prefect shows of the stage that is running."""
    return str(_context().task_run.name)


def _context() -> TaskRunContext:
    context = TaskRunContext.get()
    if context is None:
        raise RuntimeError("must be called inside of a stage")
    return context


def job_source(call: Call) -> str:
    """Return the digest of the source that a job executes, for machines to compare."""
    return closure([call.load(), worker.main], set(_strings(call.arguments))).digest


def _identity(value: Any, placed: bool) -> Any:  # noqa: ANN401
    """Return what counts of a value, as JSON."""
    if isinstance(value, Where):
        return str(value.layout.root) if placed else None
    if isinstance(value, Artifact):
        return [str(value.root) if placed else None, value.files]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _identity({f.name: getattr(value, f.name) for f in fields(value)}, placed)
    if isinstance(value, Mapping):
        return {str(key): _identity(item, placed) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item, placed) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a stage's argument must be JSON, a path or a model, got {value!r}")


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, Iterable):
        for item in value:
            yield from _strings(item)
