"""`mlflow.genai.evaluate` of the routed model by our scorers, in a real store."""

import json

import mlflow
import pandas as pd
import pytest

from tasks.genai import evaluation_rows, predict_with, scorer_named, scorer_of_rows
from tasks.routed_model import save_pyfunc
from tclora.errors import ConfigError
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import PROMPTS


def write(folder, rows, name="sums"):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.filterwarnings("ignore")  # of MLflow's own, on pandas 3
def test_the_routed_model_is_evaluated_without_a_judge(traced, library, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_MAX_WORKERS", "2")
    save_pyfunc(library, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    predict = predict_with(model, max_new_tokens=4)
    prompts = [prompt for part in PROMPTS.values() for prompt in part][:4]
    # Two answers that are right by their scorers, whatever the model says, and two that are not.
    texts = [predict(prompt) for prompt in prompts]
    rows = [
        {"prompt": prompts[0], "response": texts[0] or ".", "scorer": "exact"},
        {"prompt": prompts[1], "response": texts[1] or ".", "scorer": "exact"},
        {"prompt": prompts[2], "response": "7", "scorer": "number"},
        {"prompt": prompts[3], "response": "elppa", "scorer": "exact"},
    ]
    data = evaluation_rows([write(tmp_path, rows)])
    assert data[2]["expectations"] == {"answer": "7", "response": "7", "scorer": "number"}
    result = mlflow.genai.evaluate(
        data=data, predict_fn=predict, scorers=[scorer_of_rows(), scorer_named("number")]
    )
    assert result.metrics == {"score/mean": 0.5, "number/mean": 0.0}
    traces = mlflow.search_traces(run_id=result.run_id, return_type="list")
    assert len(traces) == 4
    assert {"route", "generate"} <= {span.name for span in traces[0].data.spans}
    assert {trace.info.tags["task"] for trace in traces} == {"sums"}
    assessed = {assessment.name for assessment in traces[0].info.assessments}
    assert {"score", "number", "answer"} <= assessed


def test_what_is_no_scorer_of_text_is_refused(tmp_path):
    rows = [{"prompt": "Is it?", "response": "yes", "choices": ["yes", "no"]}]
    file = write(tmp_path, rows, "asked")
    with pytest.raises(ConfigError, match=r"log-likelihood .* scorers=\{'asked': 'letter'\}"):
        evaluation_rows([file])
    named = evaluation_rows([file], scorers={"asked": "letter"})
    assert named[0]["expectations"]["scorer"] == "letter"
    with pytest.raises(ConfigError, match="runs code written by the model; give allow_code=True"):
        scorer_named("unit-tests")
    with pytest.raises(ConfigError, match="must be one of text, got 'choices'"):
        scorer_named("choices")


def test_a_scorer_can_be_called_by_itself():
    expected = {"answer": "12"}
    found = scorer_named("after:####")(
        inputs={"prompt": "?"}, outputs="6 and 6\n#### 12", expectations=expected
    )
    assert found == 1.0


def test_rows_are_limited(tmp_path):
    rows = [{"prompt": f"{i}+1?", "response": str(i + 1)} for i in range(5)]
    data = pd.DataFrame(evaluation_rows([write(tmp_path, rows)], limit=2))
    assert [row["prompt"] for row in data["inputs"]] == ["0+1?", "1+1?"]
