"""What a run would cost, against what the parts of it say of themselves."""

import json
import subprocess
import sys

import pytest
from transformers import Gemma3Config, LlamaForCausalLM, MistralConfig

from tclora.config import parse_config
from tclora.errors import DataError
from tclora.preflight.models import Models
from tclora.preflight.plan import fetched, make_plan
from tclora.preflight.sizes import base_size, embedder_size
from tclora.train.course import total_steps
from tclora.train.lora import attach_lora

RATE = 1e12
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"p{i:08}", "response": f"{i:05}"} for i in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**sections):
        values = {
            "base_model": str(tiny_model_dir),
            "embed": {"model": str(tiny_model_dir)},
            "data": {"path": str(path), "test_fraction": 0.2},
            "cluster": {"k": 4},
            "train": {"batch_size": 10, "epochs": 2, "dtype": "float32", "r": 2},
            "merge": {"methods": ["tc-lora"], "sample_rows": 3},
            "evaluate": {"generate": False},
            "resources": {"jobs": 1},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return parse_config(values)

    return make


def plan(config, rate=RATE):
    models = Models(config.base_model, "", config.embed.model, "")
    made = make_plan(config, models, rate)
    return made, {stage.name: stage for stage in made.stages}


def test_sizes_are_those_of_the_loaded_model(tiny_model_dir, config):
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    size = base_size(str(tiny_model_dir), config().train)
    assert size.parameters == sum(w.numel() for w in model.parameters())
    assert (size.layers, size.width, size.vocabulary) == (2, 32, model.config.vocab_size)
    assert embedder_size(str(tiny_model_dir)) == sum(w.numel() for w in model.model.parameters())
    adapted = attach_lora(model, config().train, seed=0)
    assert size.trained == sum(w.numel() for w in adapted.parameters() if w.requires_grad)


def test_rows_tokens_and_steps_are_counted(config):
    made, stages = plan(config())
    train = stages["train"]
    assert (train.jobs, train.rows) == (5, 320)  # 80 rows twice: in clusters, and in all
    assert train.steps == 4 * total_steps(20, config().train) + total_steps(80, config().train)
    assert train.tokens == 320 * 14  # a byte is a token: 9 and 5
    assert stages["embed"].tokens == 100 * 9
    assert stages["statistics"].rows == 12
    assert (stages["refit"].steps, stages["refit"].rows) == (5, 6 * 12)
    # base, own, joint, merge, the merge before its refit, routed
    assert (stages["evaluate"].jobs, stages["evaluate"].rows) == (6, 120)
    assert made.fetched == ()
    assert "rows and tokens are counted" in made.assumptions


def test_time_follows_the_rate(config):
    _, stages = plan(config())
    _, slower = plan(config(), rate=RATE / 1e8)
    for name in ("train", "refit", "evaluate"):
        assert slower[name].seconds > 10 * stages[name].seconds


def test_every_training_job_is_listed(config):
    made, stages = plan(config())
    assert made.training[0].names == ("joint",)
    assert len(made.training) == 5
    for key in ("rows", "tokens", "steps"):
        assert sum(getattr(job, key) for job in made.training) == getattr(stages["train"], key)
    assert stages["train"].memory == max(job.memory for job in made.training)


@pytest.mark.parametrize(
    ("gpus", "processes", "wanted"), [("", 2, "CPU"), ("0,1", 1, "one GPU"), ("0,1", 2, "2 GPUs")]
)
def test_what_a_training_job_runs_on(config, monkeypatch, gpus, processes, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    made, _ = plan(config(train={"data_parallel": processes}))
    assert made.device == wanted


def test_the_engine_that_auto_stands_for_is_explained(config):
    made, stages = plan(config(train={"engine": "auto"}))
    (reason,) = (line for line in made.assumptions if "train.engine auto is" in line)
    assert "separate 1.00 of the time" in reason
    assert stages["train"].jobs == len(made.training)


def test_more_in_less_out(config):
    _, stages = plan(config())
    _, bigger = plan(config(train={"tokens_per_forward": 65536}))
    _, thrifty = plan(config(train={"tokens_per_forward": 65536, "gradient_checkpointing": True}))
    assert stages["train"].memory < thrifty["train"].memory < bigger["train"].memory
    assert "statistics" not in plan(config(merge={"sample_rows": 0}))[1]
    assert plan(config(cluster={"method": "gradients"}))[1]["features"].tokens == 80 * 14
    assert plan(config(embed={"vectors": "given.parquet"}))[1]["embed"].seconds == 0
    alone = plan(config(train={"joint": False}))[1]["train"]
    assert (alone.jobs, alone.rows) == (4, 160)


def test_a_dataset_of_the_hub_is_planned_by_its_limits(config):
    hub = {"path": "sordonia/flan-10k-flat", "max_read_rows": 5000, "test_fraction": 0.1}
    made, stages = plan(config(data=hub))
    assert stages["train"].rows == 4 * 5000
    assert stages["evaluate"].rows == 6 * 500
    assert made.fetched == ("data sordonia/flan-10k-flat",)
    assert any("256 tokens per row are assumed" in line for line in made.assumptions)
    with pytest.raises(DataError, match=r"data\.max_read_rows must be set to plan"):
        plan(config(data=hub | {"max_read_rows": None}))


def test_training_seeds_repeat_what_follows_the_clusters(config):
    _, once = plan(config())
    made, thrice = plan(config().model_copy(update={"seeds": 3}))
    assert thrice["embed"] == once["embed"]
    for name in ("train", "statistics", "refit", "evaluate"):
        one, three = once[name], thrice[name]
        assert (three.jobs, three.rows, three.tokens, three.steps) == (
            3 * one.jobs, 3 * one.rows, 3 * one.tokens, 3 * one.steps,
        )  # fmt: skip
        assert three.seconds == pytest.approx(3 * one.seconds)
        assert three.memory == one.memory
    assert any("3 training seeds" in line for line in made.assumptions)


def test_what_a_plan_leaves_out_is_named(config):
    def left_out(**sections):
        return {line for line in plan(config(**sections))[0].assumptions if "not covered" in line}

    always = left_out()
    assert len(always) == 1
    assert "route.calibration_rows" in next(iter(always))
    assert not left_out(route={"enabled": False})
    for section, value in (
        ("merge", {"scales": [0.5, 1.0]}),
        ("factorise", {"target_recovery": 0.9}),
        ("evaluate", {"cross_rows": 2}),
        ("evaluate", {"lm_eval": ["piqa"]}),
    ):
        (line,) = left_out(**{section: value}) - always
        assert f"{section}.{next(iter(value))}" in line


@pytest.mark.parametrize("name", ["test_path", "ood_path", "composition_path"])
def test_held_out_rows_of_the_hub_are_planned_by_their_limit_and_not_fetched(
    config, monkeypatch, name
):
    def refuse(path, *_, **__):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("tclora.data.readers.read_hub", refuse)
    split_off = 0 if name == "test_path" else 20
    made, stages = plan(config(data={name: "org/hard", "max_test_rows": 30}))
    assert stages["train"].rows == 4 * (100 - split_off)
    assert stages["evaluate"].rows == 6 * (split_off + 30)
    assert any(f"data.{name}, rows are the limits" in line for line in made.assumptions)
    with pytest.raises(DataError, match=rf"data\.max_test_rows must be set .* data\.{name}='org"):
        plan(config(data={name: "org/hard"}))


def test_a_model_of_seven_billion_parameters_takes_the_memory_it_is_known_to(
    tmp_path, tokenizer, config
):
    folder = tmp_path / "mistral"
    MistralConfig().save_pretrained(folder)  # of the size of Mistral-7B; no weights
    tokenizer.save_pretrained(folder)
    big = config(train={"dtype": "bfloat16", "gradient_checkpointing": True}).model_copy(
        update={"base_model": str(folder)}
    )
    _, stages = plan(big)
    assert base_size(str(folder), big.train).parameters == pytest.approx(7.24e9, rel=0.01)
    assert 14e9 < stages["train"].memory < 20e9


def test_sizes_of_a_model_that_sees_too_are_its_language_model_s(tmp_path, config):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    size = base_size(str(tmp_path), config().train)
    assert (size.width, size.inner, size.layers, size.vocabulary) == (32, 48, 2, 99)


def test_what_comes_from_the_hub_is_named(config):
    found = list(
        fetched(
            config(
                data={"path": "demo", "composition_path": "org/hard"},
                evaluate={"lm_eval": ["piqa"]},
            ).model_copy(update={"base_model": "org/base"})
        )
    )
    assert found == ["base model org/base", "composition data org/hard", "lm-eval task piqa"]


def test_the_command_prints_the_plan_and_runs_nothing(config, tmp_path):
    (tmp_path / "plan.yaml").write_text(config().model_dump_json())
    command = [sys.executable, "-m", "tclora_cli", "run", str(tmp_path / "plan.yaml"), "--plan"]
    done = subprocess.run(
        [*command, "--rate", "1", "--set", f"output={tmp_path / 'runs'}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "train" in done.stdout
    assert "1 TFLOP/s per job (given)" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_run_that_stops_early_is_planned_up_to_there(config):
    made = config().model_copy(update={"seeds": 3})
    models = Models(made.base_model, "", made.embed.model, "")
    whole = make_plan(made, models, RATE)
    once = {stage.name: stage for stage in make_plan(config(), models, RATE).stages}
    names = [stage.name for stage in whole.stages]
    for until, last in (("prepare", "embed"), ("train", "train"), ("merge", "refit")):
        short = make_plan(made, models, RATE, until)
        assert [stage.name for stage in short.stages] == names[: names.index(last) + 1]
        assert all(stage == once[stage.name] for stage in short.stages)  # one seed so far
        assert short.training == (() if until == "prepare" else whole.training)
        assert f"until the step {until}" in short.assumptions
