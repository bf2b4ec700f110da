import json
import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import torch
from peft import PeftModel
from reference import row_nll
from transformers import LlamaForCausalLM

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.config import EvaluateConfig, TrainConfig
from tclora.errors import JobError
from tclora.jobs import EvaluateJob, TrainJob, run_job
from tclora.prompts import encode

ENV = {"OMP_NUM_THREADS": "1"}
CONFIG = {"r": 2, "alpha": 4, "lr": 1e-2, "batch_size": 2, "template": "plain"}


@pytest.fixture
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


@pytest.fixture
def train_job(tmp_path, tiny_model_dir, frame):
    def make(**changes):
        frame[["prompt", "response"]].to_parquet(tmp_path / "rows.parquet")
        values = {
            "name": "cluster-1", "base_location": str(tiny_model_dir),
            "rows": tmp_path / "rows.parquet", "target": tmp_path / "adapter", "seed": 0,
            "init_seed": 0, "checkpoint": tmp_path / "checkpoint",
            "train": TrainConfig(**CONFIG | changes.pop("train", {})),
        }  # fmt: skip
        return TrainJob(**values | changes)

    return make


@pytest.fixture
def poisoned_dir(tmp_path, tiny_model):
    """A model whose loss is NaN."""
    with torch.no_grad():
        tiny_model.lm_head.weight[:] = float("nan")
    tiny_model.save_pretrained(tmp_path / "poisoned")
    return tmp_path / "poisoned"


def test_a_training_job_reports_its_steps_and_leaves_a_stock_adapter(train_job, tiny_model_dir):
    job, events = train_job(), []
    result = run_job(job, env=ENV, on_event=events.append)
    assert [event["step"] for event in events] == [0, 1, 2]
    assert list(result["history"]) == events
    assert result["steps"] == 3
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    adapted = PeftModel.from_pretrained(base, job.target)
    assert adapted.peft_config["default"].r == 2
    assert not job.checkpoint.exists()


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
        name="method", base_location=str(tiny_model_dir), rows=tmp_path / "rows.parquet",
        target=tmp_path / "items.parquet", seed=0, train=TrainConfig(**CONFIG), adapters=adapters,
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


def test_rows_are_measured_with_their_clusters_adapter(
    tmp_path, tiny_model_dir, tokenizer, frame
):
    adapters = make_adapters(tmp_path / "adapters", tiny_model_dir, ["0", "1"])
    events = []
    job = evaluate_job(
        tmp_path, tiny_model_dir, frame, adapters, generate=True, max_new_tokens=3
    )
    result = run_job(job, env=ENV, on_event=events.append)
    assert result == {"rows": 5}  # no adapter for cluster 2
    assert [event["rows"] for event in events] == [3, 5]
    items = pd.read_parquet(tmp_path / "items.parquet").set_index("id")
    assert sorted(items.index) == ["id0", "id1", "id2", "id3", "id5"]
    assert set(items["method"]) == {"method"}
    assert items["generated"].notna().all()
    wanted = reference(
        tiny_model_dir, tokenizer, frame, lambda row: adapters.get(str(row.cluster))
    )
    kept = items.loc[frame["id"].drop(4)]
    assert kept["nll"].tolist() == pytest.approx(wanted[:4] + wanted[5:], rel=1e-5)
    assert kept["prompt"].tolist() == frame["prompt"].drop(4).tolist()
    assert kept["cluster"].tolist() == [1, 0, 1, 0, 0]
    assert kept["tokens"].tolist() == [len(r) + 1 for r in frame["response"].drop(4)]


@pytest.mark.parametrize("names", [[], ["all"]])
def test_all_rows_are_measured_with_one_adapter_or_none(
    tmp_path, tiny_model_dir, tokenizer, frame, names
):
    adapters = make_adapters(tmp_path / "adapters", tiny_model_dir, names)
    run_job(evaluate_job(tmp_path, tiny_model_dir, frame, adapters), env=ENV)
    items = pd.read_parquet(tmp_path / "items.parquet")
    wanted = reference(tiny_model_dir, tokenizer, frame, lambda row: adapters.get("all"))
    assert items["nll"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert items["generated"].isna().all()


def test_a_killed_job_names_the_cause(train_job):
    job = train_job(train={"epochs": 10_000})
    pids = []

    def kill(event):
        if not pids:
            pids.extend(children())
            os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(JobError, match="job cluster-1 was killed .*lack of memory"):
        run_job(job, env=ENV, on_event=kill)
    assert not job.target.exists()


def test_another_signal_is_named(train_job):
    def end(event):
        os.kill(children()[0], signal.SIGTERM)

    with pytest.raises(JobError, match="job cluster-1 was ended by SIGTERM"):
        run_job(train_job(train={"epochs": 10_000}), env=ENV, on_event=end)


def children():
    path = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children"
    with open(path) as file:  # noqa: PTH123
        return [int(pid) for pid in file.read().split()]


def test_a_job_that_takes_too_long_is_stopped(train_job):
    started = time.monotonic()
    with pytest.raises(JobError, match="its time limit of 1 s"):
        run_job(train_job(train={"epochs": 10_000}), env=ENV, timeout=1)
    assert time.monotonic() - started < 20


def test_a_loss_that_is_not_finite_comes_back_with_its_message(train_job, poisoned_dir, tmp_path):
    # The tokenizer is the tiny model's.
    for file in (poisoned_dir.parent / "poisoned", ):
        assert file.is_dir()
    job = train_job(base_location=str(poisoned_dir))
    with pytest.raises(JobError, match="job cluster-1: NonFiniteLossError: loss became nan at step 0"):
        run_job(job, env=ENV)


def test_rows_that_are_missing_come_back_as_an_error(train_job, tmp_path):
    with pytest.raises(JobError, match=r"job cluster-1: FileNotFoundError: .*none.parquet"):
        run_job(train_job(rows=tmp_path / "none.parquet"), env=ENV)


def test_an_exception_of_the_callback_ends_the_job(train_job):
    seen = []

    def fail(event):
        seen.extend(children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(train_job(train={"epochs": 10_000}), env=ENV, on_event=fail)
    assert seen
    assert not children()


def test_a_job_dies_with_its_parent(train_job, tmp_path):
    """The parent is killed at once, so only the closed pipe can tell the job."""
    spec = tmp_path / "job.json"
    spec.write_text(train_job(train={"epochs": 10_000}).model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "tclora.jobs", str(spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, **ENV}, text=True,
    )  # fmt: skip
    with process:
        assert json.loads(process.stdout.readline())["step"] == 0
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=20) == 1


def test_what_libraries_print_does_not_disturb_the_events(train_job, tmp_path):
    """A module that prints on import, as many do."""
    (tmp_path / "sitecustomize.py").write_text("print('hello from a library')\n")
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    assert run_job(train_job(), env=env)["steps"] == 3


def test_a_killed_job_resumes_at_its_checkpoint(train_job, tmp_path):
    whole = run_job(train_job(target=tmp_path / "whole", train={"epochs": 4}), env=ENV)
    job = train_job(train={"epochs": 4, "checkpoint_steps": 3})

    def kill(event):
        if event["step"] == 7:
            os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(JobError, match="was killed"):
        run_job(job, env=ENV, on_event=kill)
    again = run_job(job, env=ENV)
    assert again["steps"] == whole["steps"] == 12
    name = "adapter_model.safetensors"
    assert (job.target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
