import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import EvaluateConfig, TrainConfig
from tclora.errors import JobError
from tclora.jobs.run import Base, EvaluateJob, TrainJob, run_job
from tclora.model.tokens import encode
from tests.reference import row_nll

ENV = {"OMP_NUM_THREADS": "1"}
CONFIG = {"r": 2, "alpha": 4, "lr": 1e-2, "batch_size": 2, "template": "plain"}
TWELVE_STEPS = {"epochs": 4, "checkpoint_steps": 3}
ENDLESS = {"epochs": 10_000}


@pytest.fixture(scope="module")
def frame():
    prompts = [f"say {word}" for word in ("one", "two", "three", "four", "five", "six")]
    responses = [prompt.removeprefix("say ") for prompt in prompts]
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(6)], "prompt": prompts, "response": responses,
            "answer": responses, "scorer": "exact", "metadata": None, "split": "test",
            "task": [None, "t"] * 3, "cluster": [1, 0, 1, 0, 2, 0],
        }
    )  # fmt: skip


def base_of(location):
    return Base.of(str(location), "digest", TrainConfig(**CONFIG))


def make_job(folder, tiny_model_dir, frame, **changes):
    frame[["prompt", "response"]].to_parquet(folder / "rows.parquet")
    values = {
        "name": "cluster-1",
        "rows": folder / "rows.parquet", "target": folder / "adapter", "seed": 0,
        "init_seed": 0, "checkpoint": folder / "checkpoint",
        "train": TrainConfig(**CONFIG | changes.pop("train", {})),
    }  # fmt: skip
    base = base_of(changes.pop("base_location", tiny_model_dir))
    return TrainJob(**values | changes, base=base)


@pytest.fixture
def train_job(tmp_path, tiny_model_dir, frame):
    return partial(make_job, tmp_path, tiny_model_dir, frame)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir, frame):
    """A finished training of twelve steps: the job, its events and its result."""
    job = make_job(tmp_path_factory.mktemp("job"), tiny_model_dir, frame, train=TWELVE_STEPS)
    events = []
    return job, events, run_job(job, env=ENV, on_event=events.append)


@pytest.fixture
def poisoned_dir(tmp_path, tiny_model, tokenizer):
    """A model whose loss is NaN."""
    with torch.no_grad():
        tiny_model.lm_head.weight[:] = float("nan")
    tiny_model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    return tmp_path / "poisoned"


def running_jobs(thread):
    """Process ids of the jobs a thread has started; servers of other tests are children too."""
    found = Path(f"/proc/{os.getpid()}/task/{thread}/children").read_text().split()
    return [
        int(p) for p in found if b"tclora.jobs.worker" in Path(f"/proc/{p}/cmdline").read_bytes()
    ]


def test_a_training_job_reports_its_steps_and_leaves_a_stock_adapter(finished, tiny_model):
    job, events, result = finished
    assert [event["step"] for event in events] == list(range(12))
    assert list(result["history"]) == events
    assert result["steps"] == 12
    adapted = PeftModel.from_pretrained(tiny_model, job.target)
    assert adapted.peft_config["default"].r == 2
    assert job.checkpoint.exists()  # until the whole run is published


def test_a_killed_job_names_the_cause_and_resumes_at_its_checkpoint(finished, train_job):
    job = train_job(train=TWELVE_STEPS)

    def kill(event):
        if event["step"] == 7:
            os.kill(running_jobs(threading.get_native_id())[0], signal.SIGKILL)

    with pytest.raises(JobError, match=r"job cluster-1 was killed .*lack of memory"):
        run_job(job, env=ENV, on_event=kill)
    assert not job.target.exists()
    assert len(json.loads((job.checkpoint / "history.json").read_text())) >= 6
    again = run_job(job, env=ENV)
    whole, _, result = finished
    assert again["steps"] == result["steps"]
    name = "adapter_model.safetensors"
    assert (job.target / name).read_bytes() == (whole.target / name).read_bytes()


def make_adapters(folder, tiny_model_dir, names):
    """Adapters with clear effects, each its own."""
    paths = {}
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        factors = LoraFactors(
            torch.randn(32, 2, generator=generator), torch.randn(2, 32, generator=generator)
        )
        adapter = Adapter(name, {"model.layers.0.self_attn.q_proj": factors}, str(tiny_model_dir))
        write_adapter(adapter, folder / name)
        paths[name] = folder / name
    return paths


def evaluate_job(tmp_path, tiny_model_dir, frame, adapters, **evaluate):
    frame.to_parquet(tmp_path / "rows.parquet")
    return EvaluateJob(
        name="method", base=base_of(tiny_model_dir), rows=tmp_path / "rows.parquet",
        target=tmp_path / "items.parquet", adapters=adapters,
        evaluate=EvaluateConfig(**{"generate": False} | evaluate),
    )  # fmt: skip


def reference(tiny_model_dir, tokenizer, frame, path_of):
    """NLL of each row by its own stock PEFT model."""
    values = []
    for row in frame.itertuples():
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        if path_of(row):
            model = PeftModel.from_pretrained(model, path_of(row))
        (tokens,) = encode(tokenizer, [row.prompt], [row.response], template="plain")
        values.append(row_nll(model.eval(), tokens))
    return values


def test_rows_are_measured_with_their_clusters_adapter(tmp_path, tiny_model_dir, tokenizer, frame):
    adapters = make_adapters(tmp_path / "adapters", tiny_model_dir, ["0", "1"])
    events = []
    job = evaluate_job(tmp_path, tiny_model_dir, frame, adapters, generate=True, max_new_tokens=3)
    result = run_job(job, env=ENV, on_event=events.append)
    assert result == {"rows": 5}  # no adapter for cluster 2
    assert [event["rows"] for event in events] == [3, 5]
    items = pd.read_parquet(tmp_path / "items.parquet").set_index("id")
    assert sorted(items.index) == ["id0", "id1", "id2", "id3", "id5"]
    assert set(items["method"]) == {"method"}
    assert items["generated"].notna().all()
    wanted = reference(tiny_model_dir, tokenizer, frame, lambda row: adapters.get(str(row.cluster)))
    kept = items.loc[frame["id"].drop(4)]
    assert kept["nll"].tolist() == pytest.approx(wanted[:4] + wanted[5:], rel=1e-5)
    assert kept["prompt"].tolist() == frame["prompt"].drop(4).tolist()
    assert kept["cluster"].tolist() == [1, 0, 1, 0, 0]
    assert kept["tokens"].tolist() == [len(r) + 1 for r in frame["response"].drop(4)]


def test_a_job_ended_from_outside_names_the_signal(train_job):
    native = threading.get_native_id()

    def end():
        os.kill(running_jobs(native)[0], signal.SIGTERM)

    timer = threading.Timer(0.5, end)
    timer.start()
    with pytest.raises(JobError, match="job cluster-1 was ended by SIGTERM"):
        run_job(train_job(train=ENDLESS), env=ENV)


def test_a_job_that_takes_too_long_is_stopped(train_job):
    started = time.monotonic()
    with pytest.raises(JobError, match="its time limit of 1 s"):
        run_job(train_job(train=ENDLESS), env=ENV, timeout=1)
    assert time.monotonic() - started < 20


def test_a_loss_that_is_not_finite_comes_back_with_its_message(train_job, poisoned_dir, tmp_path):
    """Also where something prints to standard output before the job begins."""
    (tmp_path / "sitecustomize.py").write_text("print('[1] hello from a library')\n")
    job = train_job(base_location=poisoned_dir)
    message = "job cluster-1: NonFiniteLossError: loss became nan at step 0"
    with pytest.raises(JobError, match=message):
        run_job(job, env=ENV | {"PYTHONPATH": str(tmp_path)})


def test_an_exception_of_the_callback_ends_the_job(train_job):
    seen = []

    def fail(event):
        seen.extend(running_jobs(threading.get_native_id()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(train_job(train=ENDLESS), env=ENV, on_event=fail)
    assert seen
    assert not running_jobs(threading.get_native_id())


def test_a_job_dies_with_its_parent(train_job, tmp_path):
    """A parent that is killed can only be noticed by its closed pipe."""
    spec = tmp_path / "job.json"
    spec.write_text(train_job(train=ENDLESS).model_dump_json())
    command = [sys.executable, "-m", "tclora.jobs.worker", str(spec)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.stdin.close()
        assert process.wait(timeout=30) == 1
