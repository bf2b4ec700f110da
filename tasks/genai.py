"""Our scorers in ``mlflow.genai.evaluate``: answers are compared with rows, no judge is asked.

::

    mlflow.genai.evaluate(
        data=evaluation_rows(["tasks.jsonl"]),
        predict_fn=predict_with(mlflow.pyfunc.load_model("models:/demo-routed@current")),
        scorers=[scorer_of_rows()],
    )
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pandas as pd
from mlflow.genai.scorers import Scorer, scorer
from mlflow.pyfunc import PyFuncModel

from tclora.data.tasks import TaskSettings, read_tasks
from tclora.errors import ConfigError
from tclora.evaluate.scorers import CHOICES, Expected, check_leave, score

_REMEDY = "give allow_code=True to let it"


def evaluation_rows(
    files: Sequence[str],
    *,
    scorers: Mapping[str, str] | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> list[dict[str, Any]]:
    """Read task files as data for ``mlflow.genai.evaluate``.

    Parameters
    ----------
    files : sequence of str
        JSONL, Parquet or CSV files, or folders of them; see `tclora.data.tasks.read_tasks`.
    scorers : mapping, optional
        Task → scorer of all its rows, whatever they name.
    limit : int, optional
        Rows of every task.
    allow_code : bool
        Whether scorers may run what the model writes.

    Returns
    -------
    list of dict
        ``inputs`` with the prompt, ``expectations`` with what `Expected` holds and the scorer,
        ``tags`` with the task.

    Raises
    ------
    DataError
        If a file cannot be read.
    ConfigError
        If rows are answered by the log-likelihood of their options, which is no text to score, or
        a scorer runs code without leave.
    """
    settings = TaskSettings({"": limit} if limit else {}, scorers=scorers or {})
    rows = pd.concat(read_tasks(files, settings).values(), ignore_index=True)
    check_leave(rows["scorer"].unique(), allowed=allow_code, remedy=_REMEDY)
    chosen = rows[rows["scorer"] == CHOICES]
    if len(chosen):
        task = chosen["task"].iloc[0]
        raise ConfigError(
            f"rows of task {task!r} are answered by the log-likelihood of their choices; name a "
            f"scorer of text, as in scorers={{{task!r}: 'letter'}}, or use tclora eval"
        )
    return [_row(row) for row in rows.to_dict("records")]


def _row(row: Mapping[Any, Any]) -> dict[str, Any]:
    choices, metadata = row.get("choices"), row["metadata"]
    expected = {
        "answer": row["answer"],
        "response": row["response"],
        # What a row lacks is NaN where rows of another file have it.
        "choices": list(choices) if isinstance(choices, Collection) else [],
        "metadata": metadata if isinstance(metadata, str) else None,
        "scorer": row["scorer"],
    }
    return {
        "inputs": {"prompt": row["prompt"]},
        "expectations": {name: value for name, value in expected.items() if value},
        "tags": {"task": str(row["task"])},
    }


def scorer_of_rows() -> Scorer:
    """Return a scorer that scores each row by its own; its figure is called ``score``."""

    def by_row(inputs: dict[str, Any], outputs: str, expectations: dict[str, Any]) -> float:
        return score(expectations["scorer"], outputs, _expected(inputs, expectations))

    return scorer(by_row, name="score")


def scorer_named(name: str, *, allow_code: bool = False) -> Scorer:
    """Return a registered scorer of text, for all rows.

    Parameters
    ----------
    name : str
        ``NAME`` or ``NAME:ARGUMENT``, such as "number" or "after:####"; NAME is its figure's too.
    allow_code : bool
        Whether it may run what the model writes.

    Raises
    ------
    ConfigError
        If it runs code without leave, or is no scorer of text.
    ValueError
        If there is no such scorer.
    """
    if name == CHOICES:
        raise ConfigError(f"scorer must be one of text, got {name!r}; use tclora eval")
    check_leave([name], allowed=allow_code, remedy=_REMEDY)

    def by_name(inputs: dict[str, Any], outputs: str, expectations: dict[str, Any]) -> float:
        return score(name, outputs, _expected(inputs, expectations))

    return scorer(by_name, name=name.partition(":")[0])


def _expected(inputs: Mapping[str, Any], expectations: Mapping[str, Any]) -> Expected:
    return Expected(
        answer=expectations["answer"],
        prompt=inputs["prompt"],
        response=expectations.get("response", ""),
        choices=tuple(expectations.get("choices", ())),
        metadata=expectations.get("metadata"),
    )


def predict_with(model: PyFuncModel, max_new_tokens: int = 64) -> Callable[[str], str]:
    """Return what answers one prompt by a routed library's pyfunc model, for ``predict_fn``."""

    def predict(prompt: str) -> str:
        frame = pd.DataFrame({"prompt": [prompt]})
        answered: Any = model.predict(frame, params={"max_new_tokens": max_new_tokens})
        return str(answered["completion"].iloc[0])

    return predict
