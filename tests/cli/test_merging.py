"""The command line on adapters alone: merge, methods, inspect."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tclora.activations import ActivationStatistics, collect
from tclora.adapter import Adapter, LoraFactors, locate_adapter, read_adapter, write_adapter
from tclora.errors import AdapterError, DataError
from tclora.merge import merge, methods
from tclora.model.tokens import encode
from tclora.tune.rows import read_sample_files
from tclora.tune.scale import tune_scale
from tclora_cli.folders import read_adapters
from tclora_cli.main import app

NAMES = ("sums", "words")
ROWS = {
    "sums": [("What is 1 + 2?", "3"), ("What is 4 + 4?", "8")],
    "words": [("Reverse apple.", "elppa"), ("Reverse stone.", "enots")],
}


@pytest.fixture
def folders(tmp_path, tiny_model_dir):
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}
    for name in NAMES:
        modules = {
            module: LoraFactors(
                torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator)
            )
            for module, (out, into) in shapes.items()
        }
        write_adapter(Adapter(name, modules, str(tiny_model_dir)), tmp_path / name)
    return [str(tmp_path / name) for name in NAMES]


@pytest.fixture
def sample(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"adapter": name, "prompt": prompt, "response": response}) + "\n"
        for name, rows in ROWS.items()
        for prompt, response in rows
    ]
    file.write_text("".join(lines))
    return file


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def assert_same(one, other):
    for module, factors in one.modules.items():
        wanted = other.modules[module].delta()
        assert torch.allclose(factors.delta(), wanted.to(factors.B), atol=1e-4)


def test_merging_by_the_command_line_is_merging_by_the_library(folders, tmp_path):
    result = invoke("merge", *folders, "-o", tmp_path / "out", "--method", "uniform",
                    "--weights", 3, "--weights", 1)  # fmt: skip
    assert result.exit_code == 0
    assert "merged adapter" in result.stdout
    wanted = merge(read_adapters(folders), "uniform", weights=[3, 1]).adapter
    assert_same(read_adapter(tmp_path / "out"), wanted)


def test_methods_take_their_options(folders, tmp_path):
    invoke("merge", *folders, "-o", tmp_path / "out", "--method", "task-arithmetic",
           "--option", "scale=0.7")  # fmt: skip
    wanted = merge(read_adapters(folders), "task-arithmetic", scale=0.7).adapter
    assert_same(read_adapter(tmp_path / "out"), wanted)
    with pytest.raises(AdapterError, match="options must be key=value, got scale"):
        invoke("merge", *folders, "-o", tmp_path / "no", "--option", "scale")


def test_strange_options_are_named(folders, tmp_path):
    with pytest.raises(AdapterError, match=r"'rank' must be one of uniform's own: none"):
        invoke("merge", *folders, "-o", tmp_path / "no", "--method", "uniform",
               "--option", "rank=8")  # fmt: skip
    with pytest.raises(AdapterError, match="with a YAML value"):
        invoke("merge", *folders, "-o", tmp_path / "no", "--option", "scale=[1")


def test_an_output_that_is_more_than_an_adapter_is_not_replaced(folders, tmp_path):
    with pytest.raises(AdapterError, match=f"must be a new directory .* but '{NAMES[0]}' is there"):
        invoke("merge", *folders, "-o", tmp_path, "--method", "uniform")
    assert all(read_adapter(folder) for folder in folders)
    for _ in range(2):  # an adapter may be replaced
        assert invoke("merge", *folders, "-o", tmp_path / "out", "--method", "svd").exit_code == 0


@pytest.mark.parametrize("named", [True, False])
def test_sample_rows_inform_the_merge(folders, sample, tmp_path, tiny_model, tokenizer, named):
    """The same statistics collected by hand give the same merge; both forms of files do."""
    sources = [str(sample)]
    if named:
        sources = []
        for name, rows in ROWS.items():
            file = tmp_path / f"{name}.jsonl"
            pairs = [{"prompt": p, "response": r} for p, r in rows]
            file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            sources.append(f"{name}={file}")
    flags = [part for source in sources for part in ("--sample", source)]
    result = invoke("merge", *folders, "-o", tmp_path / "out", "--rank", 2,
                    "--template", "plain", *flags)  # fmt: skip
    assert result.exit_code == 0
    adapters = read_adapters(folders)
    files = []
    for name, rows in ROWS.items():
        prompts, responses = zip(*rows, strict=True)
        encoded = encode(tokenizer, prompts, responses, template="plain")
        files.append(tmp_path / f"{name}.safetensors")
        modules = list(adapters[0].modules)
        collect(tiny_model, encoded, name, modules, pad_id=0).save(files[-1])
    statistics = ActivationStatistics.load(*files)
    wanted = merge(adapters, "tc-lora", rank=2, statistics=statistics).adapter
    assert_same(read_adapter(tmp_path / "out"), wanted)
    blind = merge(adapters, "tc-lora", rank=2).adapter
    module = next(iter(wanted.modules))
    assert not torch.allclose(wanted.modules[module].delta(), blind.modules[module].delta())


def test_the_scale_is_chosen_on_sample_rows(folders, sample, tmp_path, tiny_model, tokenizer):
    flags = ["--template", "plain", "--scales", 0.01, "--scales", 3]
    result = invoke("merge", *folders, "-o", tmp_path / "out", "--method", "task-arithmetic",
                    "--sample", sample, *flags)  # fmt: skip
    rows = {
        name: encode(tokenizer, *zip(*pairs, strict=True), template="plain")
        for name, pairs in ROWS.items()
    }
    adapters = read_adapters(folders)
    scale = tune_scale(tiny_model, adapters, "task-arithmetic", rows, (0.01, 3)).scale
    assert f"scale {scale:g}" in result.stdout
    wanted = merge(adapters, "task-arithmetic", scale=scale).adapter
    assert_same(read_adapter(tmp_path / "out"), wanted)


def test_former_options_are_taken_with_a_notice_and_not_shown(folders, sample, tmp_path):
    present = ["--sample", sample, "--sample-rows", 1, "--template", "plain"]
    former = [f"--calibration={sample}", "--calibration-rows", 1, "--template", "plain"]
    quiet = invoke("merge", *folders, "-o", tmp_path / "one", *present)
    noted = invoke("merge", *folders, "-o", tmp_path / "two", *former)
    assert "is now" not in quiet.stderr
    assert "--calibration is now --sample;" in noted.stderr
    assert "--calibration-rows is now --sample-rows;" in noted.stderr
    assert_same(read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two"))
    assert "--calibration" not in invoke("merge", "--help").stdout


def test_scales_that_cannot_be_chosen_are_refused(folders, sample, tmp_path):
    def ask(*arguments):
        return invoke("merge", *folders, "-o", tmp_path / "out", "--scales", 0.4, *arguments)

    with pytest.raises(AdapterError, match="--scales needs --sample"):
        ask("--method", "ties")
    rows = ("--sample", sample)
    with pytest.raises(AdapterError, match="--scales needs a method with a scale, uniform has"):
        ask("--method", "uniform", *rows)
    with pytest.raises(AdapterError, match="exclude each other"):
        ask("--method", "ties", "--option", "scale=1", *rows)
    assert not (tmp_path / "out").exists()


def test_sample_must_serve_every_adapter_and_no_other(sample, tmp_path):
    assert set(read_sample_files([str(sample)], NAMES)) == set(NAMES)
    with pytest.raises(DataError, match=r"adapters must be of sums, got words"):
        read_sample_files([str(sample)], ["sums"])
    with pytest.raises(DataError, match="has none for prose"):
        read_sample_files([str(sample)], [*NAMES, "prose"])
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="must have a column 'adapter'"):
        read_sample_files([str(plain)], NAMES)
    plain.write_text('{"prompt": "a", "response": "b", "adapter": null}\n')
    with pytest.raises(DataError, match="row 1: 'adapter' must name an adapter"):
        read_sample_files([str(plain)], NAMES)


def test_methods_are_listed_for_people_and_programs():
    listed = json.loads(invoke("methods", "--json").stdout)
    assert [row["name"] for row in listed] == [info.name for info in methods()]
    assert {"name", "summary", "paper", "exact", "needs", "options"} <= set(listed[0])


def test_inspect_measures_and_draws(folders, tmp_path):
    result = invoke("inspect", *folders, "--picture", tmp_path / "p.png")
    assert result.exit_code == 0
    assert "sign conflict" in result.stdout
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_folders_of_one_name_are_told_apart(folders, tmp_path):
    other = tmp_path / "run2" / "sums"
    write_adapter(read_adapter(folders[0]), other)
    assert [a.name for a in read_adapters([folders[0], str(other)])] == [
        f"{tmp_path.name}-sums", "run2-sums",
    ]  # fmt: skip


def test_an_id_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(AdapterError, match="'someone/nothing' must be a directory or a Hugging"):
        locate_adapter("someone/nothing")
    with pytest.raises(AdapterError, match="must be a PEFT LoRA directory"):
        read_adapters([str(tmp_path / "nowhere")])


def test_an_adapter_of_the_hub_is_read_from_the_cache(folders, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return folders[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (adapter,) = read_adapters(["someone/sums"])
    assert adapter.name == "sums"
    assert_same(adapter, read_adapter(folders[0]))
    assert asked == [("someone/sums", ["adapter_config.json", "adapter_model.safetensors"])]
