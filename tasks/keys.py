"""Cached stages: a Prefect task whose key is all that determines its result.

The key of a stage is made of the values it is given, the digests of its inputs and the source of
all it can execute: the body of the task, the functions it calls or runs elsewhere, what they call,
and where it runs jobs also the executor and the worker. `Where` tells a stage where to work and is
left out, except for the folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from pydantic import BaseModel

from tasks.artifact import Artifact
from tasks.closure import closure
from tasks.where import Where
from tclora.files import sha256_json
from tclora.jobs import worker

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
        return task(
            name=name,
            task_run_name=run_name,
            cache_policy=StageKey(),
            persist_result=True,
            result_serializer="json",
        )(function)

    return wrap


def stage_key(stage: Task[..., Any], inputs: Mapping[str, Any]) -> str:
    """Return the key of a stage for its arguments."""
    values = {name: _identity(value) for name, value in sorted(inputs.items())}
    given = set(_strings(values))
    source = closure([stage.fn], given)
    if _ISOLATED in source.names:
        executors = [type(v.executor) for v in inputs.values() if isinstance(v, Where)]
        source = closure([stage.fn, worker.main, *executors], given)
    return sha256_json([stage.name, values, source.digest])


def current_key() -> str:
    """Return the key of the stage that is running, for names of what must not be mixed up."""
    context = TaskRunContext.get()
    if context is None:
        raise RuntimeError("current_key must be called inside of a stage")
    return stage_key(context.task, context.parameters)


def _identity(value: Any) -> Any:  # noqa: ANN401
    """Return what counts of a value, as JSON."""
    if isinstance(value, Where):
        return str(value.layout.root)
    if isinstance(value, Artifact):
        return [str(value.root), value.files]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _identity(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
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
