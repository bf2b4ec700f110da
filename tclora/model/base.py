"""The base model as the jobs of a run see it: which one it is, and how rows become its tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.model.locate import choose_dtype, default_device, load_base_model, load_tokenizer
from tclora.model.place import ModelPlace
from tclora.model.quantised import load_quantised
from tclora.model.token_file import SUFFIX, TokenFile
from tclora.model.tokens import TokenRow, encode_frame


class Base(ModelPlace):
    """Which base model, and how it reads examples; see `ModelPlace`.

    Attributes
    ----------
    dtype : {"auto", "bfloat16", "float32"}
        Type of its weights.
    template : {"chat", "plain"}
        How a prompt is written; see `tclora.model.tokens.encode`.
    max_tokens : int
        Longest example (tokens).
    """

    dtype: str
    template: Literal["chat", "plain"]
    max_tokens: int

    def load(self, quantisation: Literal["nf4"] | None = None) -> "LoadedBase":
        """Load model and tokenizer on this process's device; see `tclora.model.quantised`."""
        device = default_device()
        load = load_quantised if quantisation else load_base_model
        model = load(self.here, choose_dtype(self.dtype, device), device)
        return LoadedBase(self, model, load_tokenizer(self.here))


class LoadedBase(NamedTuple):
    """A loaded base model with its tokenizer."""

    base: Base
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, rows: Path | pd.DataFrame) -> list[TokenRow]:
        """Return examples, or those of a Parquet file (columns prompt, response), as tokens."""
        frame = rows if isinstance(rows, pd.DataFrame) else read_rows(rows)
        return encode_frame(
            self.tokenizer, frame, template=self.base.template, max_tokens=self.base.max_tokens
        )

    def rows(self, file: Path) -> Sequence[TokenRow]:
        """Return the rows of a file in tokens: as they are mapped, or encoded if it holds texts."""
        return TokenFile(file) if file.suffix == SUFFIX else self.encode(file)


def read_rows(file: Path, columns: Iterable[str] = ("prompt", "response")) -> pd.DataFrame:
    """Read columns of a Parquet file of examples."""
    return pd.read_parquet(file, columns=list(columns))
