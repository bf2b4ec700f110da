"""Generation without a checkpoint's own habits: what ends an answer is kept, all else is not.

A checkpoint may bring a repetition penalty, suppressed tokens or sampling settings, which
``generate(do_sample=False)`` keeps: its answers would not be the model's greedy ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel


def only_end_tokens(
    model: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Return a generation config with nothing but the special tokens of a model.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Its own config may name several tokens that end an answer.
    tokenizer : PreTrainedTokenizerBase
        Its end-of-sequence token, which training appends, ends an answer too.
    """
    own: Any = model.generation_config
    named = own.eos_token_id
    ends = set(named if isinstance(named, (list, tuple)) else [named])
    known = sorted(token for token in ends | {tokenizer.eos_token_id} if token is not None)
    build: Any = GenerationConfig
    plain: GenerationConfig = build(
        eos_token_id=known, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
    )
    return plain


@contextmanager
def plain_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let a model, with or without PEFT around it, generate by `only_end_tokens` for a while.

    Passing such a config to ``generate`` does not do: what it leaves open is filled from the
    model's own one.
    """
    wrapped: Any = model
    holder = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    before = holder.generation_config
    holder.generation_config = only_end_tokens(model, tokenizer)
    try:
        yield
    finally:
        holder.generation_config = before
