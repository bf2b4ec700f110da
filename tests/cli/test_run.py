"""``tclora run``: what it refuses before anything starts, and what it leaves when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
import yaml

GOOD = [{"prompt": f"What is {i} + {i}?", "response": str(2 * i)} for i in range(40)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def start(folder, *arguments, **options):
    command = [sys.executable, "-m", "tclora_cli", "run", *arguments]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])  # noqa: PTH109
    environment = {**os.environ, "PYTHONPATH": path, "PREFECT_HOME": str(folder / "prefect")}
    return subprocess.Popen(command, cwd=folder, env=environment | options, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, (), ["data.path", "'rows.jsonl'", "exists", "correct the path"]),
        (lines(GOOD[:2]) + b'{"prompt": "a", \n', (), ["rows.jsonl, line 3", "not valid JSON"]),
        (b"", (), ["rows.jsonl", "at least one row, got none"]),
        (b"[]", (), ["rows.jsonl", "at least one row, got none"]),
        (lines(GOOD[:1]) + b'{"prompt": "\xe9"}\n', (), ["rows.jsonl, line 2", "must be UTF-8"]),
        (lines([{"q": "a", "a": "b"}]), (), ["['q', 'a']", "name yours in data.columns"]),
        (lines(GOOD), ("trian.epochs=1",), ["trian: unknown key", "did you mean 'train'"]),
        (lines(GOOD), ("factorise.rank=-3",), ["factorise.rank", "greater than 0", "-3"]),
        (lines(GOOD), ("none.yaml",), ["configuration file 'none.yaml' does not exist"]),
        (lines(GOOD), ("cluster.k=50",), ["cluster.k must be at most", "(36), got 50", "lower"]),
    ],
    ids=[
        "missing",
        "malformed",
        "empty",
        "no rows",
        "not UTF-8",
        "unknown columns",
        "unknown key",
        "negative rank",
        "missing configuration",
        "threshold",
    ],
)
def test_a_bad_input_ends_the_run_before_it_starts(tmp_path, content, arguments, words):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    flags = [part for a in arguments for part in ([a] if a.endswith("yaml") else ["--set", a])]
    process = start(tmp_path, "--set", "data.path=rows.jsonl", *flags)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: ")
    assert all(word in errors for word in words), errors
    assert "Traceback" not in output + errors
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl"}


@pytest.fixture
def configuration(tmp_path, tiny_model_dir):
    (tmp_path / "rows.jsonl").write_bytes(lines(GOOD))
    values = {
        "base_model": str(tiny_model_dir),
        "data": {"path": "rows.jsonl"},
        "cluster": {"k": 2, "min_rows": 4},
        "train": {"r": 2, "template": "plain", "dtype": "float32"},
        "resources": {"jobs": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return "config.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_a_killed_run(tmp_path, configuration, end):
    process = start(tmp_path, configuration, PREFECT_API_URL="", CUDA_VISIBLE_DEVICES="")
    try:
        run = psutil.Process(process.pid)
        assert any("tclora_cli.server_process" in p.cmdline() for p in until_served(run))
        family = [run, *run.children(recursive=True)]
        process.send_signal(end)
        process.communicate(timeout=5)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
    finally:
        process.kill()
        process.communicate()


def until_served(run):
    """Wait until a descendant answers as Prefect's server does; return all descendants."""
    for _ in range(240):
        children = run.children(recursive=True)
        ports = [
            link.laddr.port
            for child in children
            for link in child.net_connections("tcp4")
            if link.status == psutil.CONN_LISTEN
        ]
        if any(healthy(port) for port in ports):
            return children
        time.sleep(0.5)
    return pytest.fail("the server did not answer")


def healthy(port):
    url = f"http://127.0.0.1:{port}/api/health"
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False
