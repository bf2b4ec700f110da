"""Traces of a routed model's answers in a real MLflow store."""

import mlflow
import pandas as pd
import pytest
from fastapi.testclient import TestClient

import tclora
from tasks.routed_model import save_pyfunc
from tasks.traces import log_served
from tclora.serve import Engine, create_app
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import FAR, PROMPTS

KNOWN = PROMPTS["cluster-1"][1]


def found_traces():
    mlflow.flush_trace_async_logging()
    return mlflow.search_traces(return_type="list", order_by=["timestamp_ms DESC"])


@pytest.fixture
def served(library, tmp_path):
    save_pyfunc(library, tmp_path / "model", "m-of-the-test")
    return mlflow.pyfunc.load_model(str(tmp_path / "model"))


def ask(served, prompts):
    return served.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 4})


def test_a_call_of_the_model_is_a_trace_of_route_and_generate(served, traced):
    answers = ask(served, [KNOWN, FAR])
    trace = found_traces()[0]
    root, route, generate = trace.data.spans
    assert [root.name, route.name, generate.name] == ["answer", "route", "generate"]
    assert route.parent_id == generate.parent_id == root.span_id
    assert root.inputs == {"prompts": [KNOWN, FAR], "max_new_tokens": 4}
    assert root.outputs == generate.outputs == answers["completion"].tolist()
    decided = route.outputs
    assert [row["known"] for row in decided] == answers["known"].tolist() == [True, False]
    assert decided[0]["weights"]["cluster-1"] == answers["cluster-1"][0] == 1.0
    assert [row["belonging"] for row in decided] == answers["belonging"].tolist()
    assert trace.info.trace_metadata["mlflow.modelId"] == "m-of-the-test"


def test_nothing_is_traced_and_no_store_made_where_none_is_named(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = sorted(tmp_path.iterdir())
    ask(served, [KNOWN])
    mlflow.flush_trace_async_logging()
    assert sorted(tmp_path.iterdir()) == before


def test_tracing_can_be_turned_off(served, traced):
    before = len(found_traces())
    mlflow.tracing.disable()
    try:
        ask(served, [KNOWN])
        assert len(found_traces()) == before
    finally:
        mlflow.tracing.enable()


def test_the_server_logs_every_answer_with_its_own_times(library, traced):
    engine = Engine(tclora.load(library))
    body = {"messages": [{"role": "user", "content": KNOWN}], "max_tokens": 4}
    with TestClient(create_app(engine, "mine", on_end=log_served)) as client:
        found = client.post("/v1/chat/completions", json=body).json()
        client.post("/v1/chat/completions", json=body | {"stream": True}).read()
    engine.close()
    streamed, trace = found_traces()[:2]
    root, route, generate = trace.data.spans
    assert [root.name, route.name, generate.name] == ["chat", "route", "generate"]
    assert root.inputs["messages"] == body["messages"]
    assert root.inputs["max_tokens"] == 4
    assert route.inputs == {"prompt": KNOWN}
    assert route.outputs == found["tclora"]
    (choice,) = found["choices"]
    text = choice["message"]["content"]
    assert root.outputs == {"text": text, "finish_reason": choice["finish_reason"]}
    assert root.start_time_ns <= route.end_time_ns == generate.start_time_ns < root.end_time_ns
    assert trace.info.token_usage["total_tokens"] == found["usage"]["total_tokens"]
    assert streamed.data.spans[0].outputs == root.outputs
