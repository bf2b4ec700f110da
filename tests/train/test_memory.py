"""Parts that exceed the memory are tried smaller."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tclora.adapter import read_adapter
from tclora.errors import ModelError
from tests.train.single import WATCHED, rows, train

__all__ = ["rows", "train"]


def limited(folder, tokens, watching=10**9):
    """Return a tiny model whose decoder runs out of memory beyond so many tokens."""
    model = LlamaForCausalLM.from_pretrained(folder)
    seen = []

    def check(decoder, args, kwargs):
        seen.append(kwargs["input_ids"].numel())
        if seen[-1] > (tokens if decoder.training else watching):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(check, with_kwargs=True)
    return model, seen


def test_what_exceeds_the_memory_is_tried_in_smaller_parts(train, tiny_model_dir, caplog):
    wanted, one = train("wanted")
    model, seen = limited(tiny_model_dir, 40)
    found, other = train("small", model=model)
    assert max(seen[-10:]) <= 32
    assert [r["loss"] for r in found.history] == pytest.approx(
        [r["loss"] for r in wanted.history], rel=1e-3
    )
    for module, factors in read_adapter(one).modules.items():
        assert torch.allclose(
            read_adapter(other).modules[module].delta(), factors.delta(), atol=1e-3
        )
    assert "train.tokens_per_forward is 32 from here on" in caplog.text
    assert caplog.text.count("out of memory") == 6  # from 2048 to 32, once


def test_rows_to_watch_are_read_in_smaller_parts_too(train, tiny_model_dir, caplog):
    wanted, _ = train("wanted", **WATCHED)
    model, _ = limited(tiny_model_dir, 10_000, watching=20)
    found, _ = train("small", model=model, **WATCHED)
    assert found.validation_nll == pytest.approx(wanted.validation_nll, rel=1e-3)
    assert "out of memory" in caplog.text


def test_a_row_that_exceeds_the_memory_alone_is_an_error(train, tiny_model_dir):
    model, _ = limited(tiny_model_dir, 12)
    with pytest.raises(ModelError, match=r"a row of \d+ tokens must fit .* lower train.max_tokens"):
        train(model=model)
