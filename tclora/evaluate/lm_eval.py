"""Standard benchmarks by lm-eval, on the model already in memory.

Tasks that execute what the model writes (HumanEval, MBPP) run only where the configuration allows
it: lm-eval starts each program in a process of its own with a time limit and destructive functions
removed, to which this module adds a limit on file sizes. That is a guard against accidents, not
against attacks; run them on a machine you can lose.
"""

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.errors import ConfigError
from tclora.model.generation import plain_generation

_EXECUTING = ("humaneval", "mbpp", "cruxeval", "longproc")
_GIB = 1 << 30


def executes_code(task: str) -> bool:
    """Whether an lm-eval task runs code written by the model."""
    return task.startswith(_EXECUTING)


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code_execution: bool = False,
) -> pd.DataFrame:
    """Evaluate a model on lm-eval tasks.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        The model as it is, adapters active; of its generation defaults only the end tokens count.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    tasks : sequence of str or mapping
        Names of lm-eval, or task configurations.
    limit : int, optional
        Items per task.
    batch_size : int
        Sequences per forward pass.
    allow_code_execution : bool
        Let tasks that execute generated code run.

    Returns
    -------
    DataFrame
        Columns task, metric, value, stderr (NaN where lm-eval gives none).

    Raises
    ------
    ConfigError
        If lm-eval is not installed, or a task executes code without leave.
    """
    refused = [t for t in tasks if isinstance(t, str) and executes_code(t)]
    if refused and not allow_code_execution:
        raise ConfigError(
            f"evaluate.lm_eval: {', '.join(refused)} run code written by the model; "
            "set evaluate.allow_code_execution: true to let them, on a machine you can lose"
        )
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("evaluate.lm_eval needs lm-eval: pip install tclora[lm-eval]") from error
    named = any(isinstance(task, str) for task in tasks)
    with _limits(active=bool(refused)), plain_generation(model, tokenizer):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            # Indexing all task files takes seconds; ready-made configurations need none.
            task_manager=TaskManager(include_defaults=named),
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=bool(refused),
        )
    return pd.DataFrame(
        list(_rows(results["results"])), columns=["task", "metric", "value", "stderr"]
    )


def _rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, name = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not name:
                continue
            error = figures.get(f"{metric}_stderr,{name}")
            stderr = float(error) if isinstance(error, (int, float)) else float("nan")
            yield task, metric, float(value), stderr


@contextmanager
def _limits(*, active: bool) -> Iterator[None]:
    """Limits that programs started from here inherit; lifted at the end of the block."""
    if not active:
        yield
        return
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    kinds = {resource.RLIMIT_FSIZE: _GIB // 16, resource.RLIMIT_CORE: 0}
    before = {kind: resource.getrlimit(kind) for kind in kinds}
    try:
        for kind, soft in kinds.items():
            resource.setrlimit(kind, (soft, before[kind][1]))
        yield
    finally:
        for kind, limits in before.items():
            resource.setrlimit(kind, limits)
        del os.environ["HF_ALLOW_CODE_EVAL"]
