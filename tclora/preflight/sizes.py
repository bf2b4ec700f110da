"""Sizes that a plan is made of: rows and tokens, parameters of models; no weights are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Conv1D, PreTrainedModel

from tclora.config import Config, TrainConfig
from tclora.data.demo import DEMO
from tclora.data.examples import profile, read_examples, read_rows
from tclora.data.readers import is_local
from tclora.errors import DataError
from tclora.model.locate import token_counter
from tclora.preflight.data import HELD_OUT, without_sources
from tclora.preflight.models import Models
from tclora.train.lora import attach_lora

HUB_TOKENS = 256  # per row of a dataset that is not here, or train.max_tokens where that is less
RESPONSE_SHARE = 0.3  # of such a row


@dataclass(frozen=True)
class RowCounts:
    """Rows of a run and their mean tokens.

    Attributes
    ----------
    train, held_out : int
        Rows.
    prompt, response : float
        Mean tokens of the base model's tokenizer.
    source : str
        How that is known.
    """

    train: int
    held_out: int
    prompt: float
    response: float
    source: str

    @property
    def tokens(self) -> float:
        """Mean tokens of a whole row."""
        return self.prompt + self.response


@dataclass(frozen=True)
class BaseSize:
    """A causal LM's size.

    Attributes
    ----------
    parameters, trained : int
        Of the model, and of an adapter on it.
    linear : int
        Weights of its linear layers, the output layer left out.
    layers, width, inner, vocabulary : int
        As its configuration says; `inner` is the width inside of a feed-forward layer.
    """

    parameters: int
    trained: int
    linear: int
    layers: int
    width: int
    inner: int
    vocabulary: int


def count_rows(config: Config, models: Models) -> RowCounts:
    """Count what is here; take the configured limits of what is on the hub, and fetch nothing.

    Raises
    ------
    DataError
        If a dataset of the hub has no limit.
    """
    data = config.data
    if _on_hub(data.path):
        return _from_limits(config)
    named = [name for name in HELD_OUT if (path := getattr(data, name)) and _on_hub(path)]
    examples = read_examples(without_sources(data, named), config.seed)
    figures = profile(examples, token_counter(models.base), config.train.max_tokens)
    train = int(figures["rows_train"])
    held_out = int(figures["rows"]) - train + sum(_held_out_rows(config, name) for name in named)
    limits = f"; of {', '.join(f'data.{name}' for name in named)}, rows are the limits"
    return RowCounts(
        train, held_out, figures["prompt_tokens_mean"], figures["response_tokens_mean"],
        f"rows and tokens are counted{limits if named else ''}",
    )  # fmt: skip


def _from_limits(config: Config) -> RowCounts:
    data = config.data
    limits = [n for n in (data.max_read_rows, data.max_train_rows) if n]
    if not limits:
        raise DataError(
            f"data.max_read_rows must be set to plan a run on {data.path!r}, a dataset of the hub "
            "whose rows are not known before it is read; set it or data.max_train_rows"
        )
    train = min(limits)
    split_off = 0.0 if data.test_path else data.test_fraction
    held_out = min(round(train * split_off), data.max_test_rows or train)
    held_out += sum(_held_out_rows(config, name) for name in HELD_OUT if getattr(data, name))
    tokens = min(HUB_TOKENS, config.train.max_tokens)
    return RowCounts(
        train, held_out, tokens * (1 - RESPONSE_SHARE), tokens * RESPONSE_SHARE,
        f"rows are the configured limits, {tokens} tokens per row are assumed",
    )  # fmt: skip


def _held_out_rows(config: Config, name: str) -> int:
    """Count the rows of a source that is wholly held out; take the limits of one of the hub."""
    data = config.data
    path = str(getattr(data, name))
    limits = [n for n in (data.max_read_rows, data.max_test_rows) if n]
    if not _on_hub(path):
        return min([len(read_rows(data, path, config.seed)[0]), *limits])
    if not limits:
        raise DataError(
            f"data.max_test_rows must be set to plan a run with data.{name}={path!r}, a dataset of "
            "the hub whose rows are not known before it is read; set it or data.max_read_rows"
        )
    return min(limits)


def _on_hub(path: str) -> bool:
    return path != DEMO and not is_local(path)


def base_size(location: str, train: TrainConfig) -> BaseSize:
    """Return the size of a causal LM and of an adapter on it; no weights are read."""
    settings: Any = AutoConfig.from_pretrained(location)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
        parameters = sum(weight.numel() for weight in model.parameters())
        linear = sum(weight.numel() for weight in _linear_weights(model))
        adapted = attach_lora(model, train, seed=0)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    text = settings.get_text_config()  # of a model that also sees or hears, its language model
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return BaseSize(
        parameters, trained, linear, text.num_hidden_layers, width, inner, text.vocab_size
    )


def _linear_weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield module.weight


def embedder_size(location: str) -> int:
    """Return the parameters of an embedding model; no weights are read."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(location))
    return sum(weight.numel() for weight in model.parameters())
