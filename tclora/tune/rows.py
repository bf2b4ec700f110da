"""Sample rows for adapters that tclora did not train, and the statistics collected on them.

A file serves one adapter (``NAME=FILE``), or several if its column ``adapter`` names each row's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.activations.collect import ActivationStatistics, collect
from tclora.adapter import Adapter
from tclora.adapter.union import module_names
from tclora.data.frame import canonical_frame
from tclora.data.readers import read_table
from tclora.errors import DataError
from tclora.model.tokens import TokenRow, encode_frame

COLUMN = "adapter"


def read_sample_files(
    sources: Sequence[str], names: Sequence[str], limit: int = 64
) -> dict[str, pd.DataFrame]:
    """Read the sample rows of every adapter.

    Parameters
    ----------
    sources : sequence of str
        ``NAME=FILE``, or files with a column ``adapter``; rows in any form that training data may
        have.
    names : sequence of str
        The adapters; each must get rows.
    limit : int
        At most this many rows per adapter, the first ones.

    Returns
    -------
    dict of str to DataFrame
        Adapter → canonical rows.

    Raises
    ------
    DataError
        If a file cannot be read, names an adapter that is not there, or leaves one without rows.
    """
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    for source in sources:
        name, sign, path = source.partition("=")
        whole = not sign or Path(source).exists()  # a path may hold an equals sign
        rows = _by_adapter(source) if whole else {name: _canonical(path)}
        if unknown := sorted(set(rows) - set(names)):
            raise DataError(
                f"sample {source!r}: adapters must be of {', '.join(names)}, got "
                f"{', '.join(unknown)}"
            )
        for adapter, frame in rows.items():
            parts[adapter].append(frame)
    if missing := [name for name, frames in parts.items() if not frames]:
        raise DataError(
            f"sample must have rows for every adapter, has none for {', '.join(missing)}; "
            "give NAME=FILE, or a column 'adapter'"
        )
    return {name: pd.concat(frames).head(limit) for name, frames in parts.items()}


def collect_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, pd.DataFrame],
    adapters: Sequence[Adapter],
    folder: Path,
    *,
    template: str = "chat",
    max_tokens: int = 1024,
) -> ActivationStatistics:
    """Collect the activation statistics of every adapter's rows.

    Parameters
    ----------
    model, tokenizer
        The adapters' base model.
    rows : Mapping[str, DataFrame]
        Adapter → canonical rows.
    adapters : sequence of Adapter
        Their modules are watched.
    folder : Path
        For one file per adapter, which the result reads when asked.
    template, max_tokens
        See `tclora.model.tokens.encode`.
    """
    files = []
    modules = module_names(adapters)
    for number, (name, frame) in enumerate(rows.items()):
        encoded = encode_frame(tokenizer, frame, template=template, max_tokens=max_tokens)
        files.append(folder / f"{number}.safetensors")
        collect(model, encoded, name, modules, pad_id=tokenizer.pad_token_id).save(files[-1])
    return ActivationStatistics.load(*files)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, pd.DataFrame],
    *,
    template: str = "chat",
    max_tokens: int = 1024,
) -> dict[str, list[TokenRow]]:
    """Return the rows of every adapter in tokens, to measure a loss on; see `collect_all`."""
    return {
        name: encode_frame(tokenizer, frame, template=template, max_tokens=max_tokens)
        for name, frame in rows.items()
    }


def _canonical(path: str) -> pd.DataFrame:
    return canonical_frame(read_table(path), path)[0]


def _by_adapter(path: str) -> dict[str, pd.DataFrame]:
    raw = read_table(path)
    if COLUMN not in raw:
        raise DataError(
            f"{path}: must have a column {COLUMN!r} that names each row's adapter, has "
            f"{', '.join(map(str, raw.columns))}; or give NAME={path}"
        )
    if raw[COLUMN].isna().any():
        row = raw.index[raw[COLUMN].isna()][0]
        raise DataError(f"{path}, row {row}: {COLUMN!r} must name an adapter, but is empty")
    return {
        str(name): canonical_frame(part.drop(columns=COLUMN), path)[0]
        for name, part in raw.groupby(COLUMN, sort=True)
    }
