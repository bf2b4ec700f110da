"""One adapter of the tiny model, trained on six rows."""

import pytest
from transformers import LlamaForCausalLM

from tclora.config import AdapterConfig
from tclora.model.tokens import encode
from tclora.train.loop import train_adapter

FAST = {"r": 4, "alpha": 8, "lr": 5e-2, "batch_size": 4, "epochs": 6}
WATCHED = {"validation_fraction": 0.34, "validation_steps": 2}


@pytest.fixture(scope="module")
def rows(tokenizer):
    prompts = [f"say {word}" for word in ("one", "two", "three", "four", "five", "six")]
    responses = [prompt.removeprefix("say ") for prompt in prompts]
    return encode(tokenizer, prompts, responses, template="plain")


@pytest.fixture
def train(tiny_model_dir, rows, tmp_path):
    """Train on a fresh copy of the tiny model; returns the result and the adapter's folder."""

    def run(name="adapter", *, on=rows, model=None, options=None, **changes):
        target = tmp_path / name
        model = model or LlamaForCausalLM.from_pretrained(tiny_model_dir)
        config = AdapterConfig(**FAST | changes)
        result = train_adapter(
            model, on, config, target, base_model=str(tiny_model_dir), **options or {}
        )
        return result, target

    return run
