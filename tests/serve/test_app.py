import json
import threading

import pytest
from fastapi.testclient import TestClient

from tclora.serve import Engine, Limits, create_app
from tests.route.conftest import *  # noqa: F403
from tests.serve.test_engine import ALL, library, model  # noqa: F401

URL = "/v1/chat/completions"


@pytest.fixture
def client(model):  # noqa: F811
    engine = Engine(model)
    with TestClient(create_app(engine, "mine", Limits(max_tokens=50, default_tokens=6))) as client:
        yield client
    engine.close()


def body(prompt=ALL[0], **options):
    return {"messages": [{"role": "user", "content": prompt}], **options}


def test_a_chat_is_answered_with_its_route(client, model):  # noqa: F811
    wanted = model.generate(ALL[:1], max_new_tokens=6)[0]
    found = client.post(URL, json=body()).json()
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text}
    assert choice["finish_reason"] in {"length", "stop"}
    assert found["usage"]["completion_tokens"] == len(wanted.tokens)
    assert found["usage"]["prompt_tokens"] == len(ALL[0]) + 1
    assert found["tclora"] == {
        "known": True, "belonging": wanted.belonging, "weights": wanted.weights, "by_token": False,
    }  # fmt: skip


def test_requests_at_once_get_the_answers_they_get_alone(client):
    alone = [client.post(URL, json=body(p)).json()["choices"] for p in ALL]
    found = [None] * len(ALL)

    def ask(i):
        found[i] = client.post(URL, json=body(ALL[i])).json()["choices"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(ALL))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_stream_gives_the_same_text_in_events(client):
    whole = client.post(URL, json=body()).json()["choices"][0]
    with client.stream("POST", URL, json=body(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["tclora"]["known"] is True
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok", "model": "mine", "waiting": 0}
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "mine"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "role 'user'"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "must leave room in 512"),
        ({"max_tokens": 51}, 400, "max_tokens must be at most 50, got 51"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"logit_bias": {}}, 400, "logit_bias: Extra inputs are not permitted"),
        ({"model": "other"}, 404, "model must be 'mine', got 'other'"),
        ({"user": "x" * (1 << 20)}, 413, "Content-Length"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client, change, status, message):
    response = client.post(URL, json=body() | change)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_messages_that_do_not_fit_the_template_are_refused(client, model):  # noqa: F811
    model.library.info.__dict__["template"] = "chat"
    model.tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    response = client.post(URL, json=body())
    assert response.status_code == 400
    assert "no system role here" in response.json()["error"]["message"]
