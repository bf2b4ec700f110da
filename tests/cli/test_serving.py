"""The command line on a routed library: generate, export, serve."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

import tclora
from tclora.adapter import read_adapter
from tclora.errors import AdapterError, LibraryError
from tclora_cli.main import app
from tests.merge.examples import assert_same_updates
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import FAR, PROMPTS

PROMPT = PROMPTS["cluster-1"][1]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_generate_shows_answers_and_routes(library):
    wanted = tclora.load(library).generate([PROMPT, FAR], max_new_tokens=5)
    result = invoke("generate", library, PROMPT, FAR, "--max-new-tokens", 5, "--json")
    rows = json.loads(result.stdout)
    assert [row["text"] for row in rows] == [answer.text for answer in wanted]
    assert [row["known"] for row in rows] == [True, False]
    assert rows[0]["weights"]["cluster-1"] == 1.0
    shown = invoke("generate", library, PROMPT, FAR, "--max-new-tokens", 5).stdout
    assert all(word in shown for word in ("cluster-1", "100%"))  # a narrow table breaks lines
    assert "fallback" in shown
    with pytest.raises(LibraryError, match="prompts must not be empty, but number 2 is"):
        invoke("generate", library, PROMPT, " ")


def test_generate_takes_another_router(library):
    wanted = tclora.load(library, router="per-token").generate([PROMPT, FAR], max_new_tokens=5)
    arguments = ("generate", library, PROMPT, FAR, "--max-new-tokens", 5, "--router")
    rows = json.loads(invoke(*arguments, "per-token", "--json").stdout)
    assert [row["text"] for row in rows] == [answer.text for answer in wanted]
    assert [row["by_token"] for row in rows] == [True, True]
    assert "every token" in invoke(*arguments, "per-token").stdout
    with pytest.raises(LibraryError, match="got 'per-tokn'; did you mean per-token"):
        invoke(*arguments, "per-tokn")


def test_export_writes_plain_adapters(library, gated, tmp_path):
    invoke("export", library, "-o", tmp_path / "one", "--cluster", "cluster-2")
    assert_same_updates(read_adapter(tmp_path / "one"), gated.cluster(2))
    invoke("export", library, "-o", tmp_path / "mix", "--weight", "cluster-0=0.5",
           "--weight", "cluster-2=0.5")  # fmt: skip
    assert_same_updates(read_adapter(tmp_path / "mix"), gated.mixed([0.5, 0, 0.5]))
    with pytest.raises(AdapterError, match="must be a new directory"):
        invoke("export", library, "-o", library, "--cluster", 0)
    with pytest.raises(LibraryError, match="must be NAME=NUMBER, got cluster-0"):
        invoke("export", library, "-o", tmp_path / "none", "--weight", "cluster-0")
    with pytest.raises(LibraryError, match="exactly one of cluster, weights and share"):
        invoke("export", library, "-o", tmp_path / "none")
    with pytest.raises(LibraryError, match="cluster must be one of cluster-0"):
        invoke("export", library, "-o", tmp_path / "none", "--cluster", "cooking")


@pytest.mark.slow
def test_serve_answers_on_loopback_and_logs_traces(library, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tclora_cli", "serve", str(library), "--port", str(port)]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
        cwd=tmp_path,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, f"{url}/health")
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5}
        request = urllib.request.Request(  # noqa: S310
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            found = json.load(response)
        trace = _first_trace(store, "library")
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()
    wanted = tclora.load(library).generate([PROMPT], max_new_tokens=5)[0]
    assert found["choices"][0]["message"]["content"] == wanted.text
    assert found["model"] == "library"
    assert [span.name for span in trace.data.spans] == ["chat", "route", "generate"]
    assert trace.data.spans[0].outputs["text"] == wanted.text


def _first_trace(store, experiment):
    """Return the first trace once it is whole: its root span is written last."""
    client = MlflowClient(store)
    place = client.get_experiment_by_name(experiment).experiment_id
    for _ in range(60):
        for trace in client.search_traces(locations=[place]):
            if any(span.parent_id is None for span in trace.data.spans):
                return trace
        time.sleep(0.5)
    pytest.fail("the server has logged no trace")


def _wait(server, url):
    for _ in range(120):
        assert server.poll() is None, server.stdout.read()
        try:
            with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
                assert json.load(response)["status"] == "ok"
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not start")
