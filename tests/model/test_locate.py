import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from tclora.errors import ModelError
from tclora.model import locate
from tclora.model.locate import (
    BUILTIN_BASE,
    BUILTIN_EMBEDDER,
    choose_dtype,
    devices_of,
    load_base_model,
    load_tokenizer,
    locate_base_model,
    locate_embedder,
    model_digest,
)
from tclora.model.place import cache_dir


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_a_local_folder_is_used_as_it_is(folder):
    assert locate_base_model(str(folder)) == str(folder)
    model = load_base_model(str(folder), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize("locate", [locate_base_model, locate_embedder])
def test_unknown_models_say_what_could_be_meant(locate, tmp_path):
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' must be .* \(built in\), a local folder"
    ):
        locate("nobody/nothing")
    with pytest.raises(ModelError, match=r"must hold a config\.json"):
        locate(str(tmp_path))


def test_weights_that_cannot_be_read_are_a_model_error(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"base_model .* cannot be loaded"):
        load_base_model(str(folder), torch.float32)


def test_the_digest_sees_configuration_names_and_sizes(folder):
    before = model_digest(str(folder))
    assert model_digest(str(shutil.copytree(folder, folder.parent / "copy"))) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed = model_digest(str(folder))
    assert changed != before
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert model_digest(str(folder)) not in {before, changed}


def test_a_missing_padding_token_becomes_the_end_token(folder):
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("pad_token")
    file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_choose_dtype():
    assert choose_dtype("float32") == torch.float32
    assert choose_dtype("bfloat16", "cuda") == torch.bfloat16
    assert choose_dtype("auto") in {torch.float32, torch.bfloat16}


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TCLORA_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("TCLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tclora"


def test_the_packaged_embedder_is_found():
    assert load_tokenizer(locate_embedder(BUILTIN_EMBEDDER))


@pytest.mark.slow
def test_the_packaged_base_model_is_converted_once():
    location = locate_base_model(BUILTIN_BASE)
    assert locate_base_model(BUILTIN_BASE) == location
    tokenizer, model = load_tokenizer(location), load_base_model(location, torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


@pytest.mark.slow
def test_tokens_have_the_roles_that_the_packaged_file_gives_them(monkeypatch):
    """As in transformers 5.17, which ended responses with the token that begins a message."""
    read = AutoTokenizer.from_pretrained

    def misread(*args, **kwargs):
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", misread)
    source = locate._package_dir(locate._GGUF_PACKAGE, "")
    tokenizer = locate._tokenizer_of_gguf(source)
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|im_end|>"] * 2
    assert tokenizer.bos_token == "<|im_start|>"
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert turn.endswith("<|im_start|>user\nx<|im_end|>\n")


def test_processes_share_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_of("auto") == ["cpu"]
    assert devices_of(2) == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto") == ["cuda:0", "cuda:1"]
    assert devices_of(3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_of(1) == ["cuda:0"]
