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
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.errors import ConfigError
from tclora.model.generation import plain_generation

if TYPE_CHECKING:
    from tclora.evaluate.lm_eval_model import Routes

_MAIN = ("acc", "exact_match")  # metrics that tell whether an item is right, before any other
_EXECUTING = ("humaneval", "mbpp", "cruxeval", "longproc")
_GIB = 1 << 30
YAML = (".yaml", ".yml")  # ends of the names of task files


def executes_code(task: str) -> bool:
    """Whether an lm-eval task runs code written by the model."""
    return task.startswith(_EXECUTING)


class LmEvalResult(NamedTuple):
    """What lm-eval found.

    Attributes
    ----------
    figures : DataFrame
        Columns task, metric, value, stderr (NaN where lm-eval gives none).
    items : DataFrame
        Columns id, task, prompt, answer, generated, correct (the task's main metric),
        correct_norm, logprobs; one row per task, filter and document.
    """

    figures: pd.DataFrame
    items: pd.DataFrame


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    token_budget: int = 2048,
    allow_code_execution: bool = False,
    routes: "Routes | None" = None,
) -> LmEvalResult:
    """Evaluate a model on lm-eval tasks.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        The model as it is, adapters active; of its generation defaults only the end tokens count.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    tasks : sequence of str or mapping
        Names of lm-eval, files of task configurations (YAML), or task configurations.
    limit : int, optional
        Items per task.
    few_shot : int, optional
        Rows shown before each prompt, except in tasks that say 0; else as the tasks say.
    token_budget : int
        Padded tokens per forward pass.
    allow_code_execution : bool
        Let tasks that execute generated code run.
    routes : callable, optional
        See `tclora.evaluate.lm_eval_model.SharedContexts`.

    Returns
    -------
    LmEvalResult

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
        from lm_eval.tasks import TaskManager

        from tclora.evaluate.lm_eval_model import SharedContexts
    except ImportError as error:
        raise ConfigError("evaluate.lm_eval needs lm-eval: pip install tclora[lm-eval]") from error
    named = any(isinstance(task, str) and not task.endswith(YAML) for task in tasks)
    with _limits(active=bool(refused)), plain_generation(model, tokenizer):
        results = simple_evaluate(
            model=SharedContexts(model, tokenizer, token_budget=token_budget, routes=routes),
            tasks=list(tasks),
            # Indexing all task files takes seconds; ready-made configurations need none.
            task_manager=TaskManager(include_defaults=named),
            limit=limit,
            num_fewshot=few_shot,
            bootstrap_iters=0,
            confirm_run_unsafe_code=bool(refused),
        )
    figures = list(_rows(results["results"]))
    items = [item for name, samples in results["samples"].items() for item in _items(name, samples)]
    return LmEvalResult(
        pd.DataFrame(figures, columns=["task", "metric", "value", "stderr"]), pd.DataFrame(items)
    )


def _items(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield lm-eval's samples as items; a task of several filters is one task for each of them."""
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in samples:
        main = [name for name in _MAIN if name in sample["metrics"]] or sample["metrics"]
        asked = [list(arguments) for arguments in sample["arguments"]]
        chosen = isinstance(asked[0][1], str)  # a continuation, not settings of generation
        yield {
            "id": f"{task}-{sample['doc_id']}",
            "task": f"{task} ({sample['filter']})" if several else task,
            "prompt": asked[0][0],
            "answer": str(sample["target"]),
            "generated": None if chosen else str(sample["filtered_resps"][0]),
            "correct": _number(sample[main[0]]),
            "correct_norm": _number(sample.get("acc_norm")),
            "logprobs": [float(answers[0][0]) for answers in sample["resps"]] if chosen else None,
        }


def _number(value: Any) -> float:  # noqa: ANN401
    """Return a figure of an item; NaN where the metric is of the whole task alone."""
    return float(value) if isinstance(value, (bool, int, float)) else float("nan")


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
