"""Stages that run beside each other, as many at once as the executor takes."""

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, flow
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.context import Context
from tclora.errors import JobError

P = ParamSpec("P")
R = TypeVar("R")


def _slots(context: Context) -> int:
    return context.where.executor.slots


def parallel_flow(
    name: str, slots: Callable[[Context], int] = _slots
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a flow, whose first argument is the context, that runs jobs beside each other.

    `slots` says how many; by default as many as the executor takes.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        made: Flow[P, R] = flow(name=name, validate_parameters=False)(function)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            context = args[0]
            if not isinstance(context, Context):
                raise TypeError(f"the first argument of {name} must be a Context, got {context!r}")
            threads = slots(context)
            runner: Any = ThreadPoolTaskRunner(max_workers=threads)  # its stubs and Flow's disagree
            with context.where.progress.shown():
                return made.with_options(task_runner=runner)(*args, **kwargs)

        return run

    return wrap


def collect(stage: str, futures: Mapping[str, PrefectFuture[R]], context: Context) -> dict[str, R]:
    """Wait for all jobs; if some failed, name them. What the others made stays in the cache."""
    try:
        wait(list(futures.values()))
    except BaseException:  # an interruption: threads cannot be stopped, their jobs can
        context.where.executor.stop()
        raise
    failed = {name: f.state.message for name, f in futures.items() if not f.state.is_completed()}
    if failed:
        listing = "\n".join(f"  - {name}: {message}" for name, message in failed.items())
        raise JobError(
            f"{len(failed)} of {len(futures)} {stage} jobs failed; the others are kept and a new "
            f"run repeats these only:\n{listing}"
        )
    return {name: future.result() for name, future in futures.items()}
