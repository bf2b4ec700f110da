"""From a data configuration to the examples of a run: read, checked, split, sampled."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tclora.config import DataConfig
from tclora.data.demo import DEMO, demo_examples
from tclora.data.frame import canonical_rows, content_ids
from tclora.data.readers import read_blocks
from tclora.errors import DataError

_TOKENISED = 10_000  # texts whose tokens are in memory at once
_COUNTED = 50_000  # rows whose tokens are counted


@dataclass(frozen=True)
class ExampleSet:
    """The rows of a run.

    Attributes
    ----------
    frame : DataFrame
        Canonical columns, ids unique, every row with a split.
    skipped : tuple of str
        One line per row left out, with its source and number.
    """

    frame: pd.DataFrame
    skipped: tuple[str, ...]


def read_examples(config: DataConfig, seed: int = 0) -> ExampleSet:
    """Read everything a configuration names and divide it into splits.

    Parameters
    ----------
    config : DataConfig
        Sources, column names, held-out tasks, sample sizes.
    seed : int
        Seed of the test split and of sampling, where ``config.seed`` names no other.

    Returns
    -------
    ExampleSet

    Raises
    ------
    DataError
        If a source cannot be read or a split needed for training is empty.
    """
    seed = seed if config.seed is None else config.seed
    frame, skipped = _read_sources(config, seed)
    frame = _without_repeats(frame.assign(id=content_ids(frame)))
    frame = _sample(_split_off_test(frame, config.test_fraction, seed), config, seed)
    if not (frame["split"] == "train").any():
        raise DataError(f"data.path {config.path!r}: no training row is left after splitting")
    return ExampleSet(frame.reset_index(drop=True), tuple(skipped))


def _read_sources(config: DataConfig, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Read all sources; rows of the first have a split where they say so."""
    main, skipped = read_rows(config, config.path, seed)
    parts = [_mark_held_out_tasks(main, config.ood_tasks)]
    for path, split in (
        (config.test_path, "test"),
        (config.ood_path, "ood"),
        (config.composition_path, "composition"),
    ):
        if path:
            extra, more = read_rows(config, path, seed)
            parts.append(extra.assign(split=split))
            skipped += more
    return (pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]), skipped


def read_rows(config: DataConfig, path: str, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Read one source of a configuration; return its canonical rows and the rows left out."""
    limit = config.max_read_rows
    if path == DEMO:
        raw = demo_examples(config.demo_train_rows, config.demo_test_rows, seed)
        return canonical_rows([raw], DEMO, limit=limit, seed=seed)
    blocks = read_blocks(path, config.hub_config, config.hub_split, stream=limit is not None)
    return canonical_rows(blocks, path, config.columns, config.on_bad_row, limit=limit, seed=seed)


def _mark_held_out_tasks(frame: pd.DataFrame, tasks: tuple[str, ...]) -> pd.DataFrame:
    missing = set(tasks) - set(frame["task"].dropna())
    if missing:
        raise DataError(
            f"data.ood_tasks: {sorted(missing)} must be task labels of the data, "
            f"which has {sorted(set(frame['task'].dropna()))}"
        )
    return frame.assign(split=frame["split"].mask(frame["task"].isin(tasks), "ood"))


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop training rows whose prompt is asked in an evaluation split: they would leak."""
    asked = set(frame.loc[frame["split"].notna() & (frame["split"] != "train"), "prompt"])
    leaked = frame["prompt"].isin(asked) & (frame["split"].isna() | (frame["split"] == "train"))
    return frame[~leaked].reset_index(drop=True) if leaked.any() else frame


def _split_off_test(frame: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """Mark unmarked rows: test rows are chosen by prompt, so that no prompt is on both sides."""
    unmarked = frame["split"].isna()
    if (frame["split"] == "test").any() or not unmarked.any():
        return frame.assign(split=frame["split"].fillna("train"))
    prompts = frame.loc[unmarked, "prompt"].drop_duplicates()
    # At least one row stays on each side wherever there are two.
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1) if fraction else 0
    chosen = set(prompts.sample(n=count, random_state=seed))
    filler = frame["prompt"].isin(chosen).map({True: "test", False: "train"})
    return frame.assign(split=frame["split"].where(~unmarked, filler))


def _sample(frame: pd.DataFrame, config: DataConfig, seed: int) -> pd.DataFrame:
    def limit(split: str) -> int | None:
        return config.max_train_rows if split == "train" else config.max_test_rows

    sizes = frame["split"].value_counts()
    if all(not (n := limit(str(split))) or size <= n for split, size in sizes.items()):
        return frame
    parts = [
        part
        if not (n := limit(str(split))) or len(part) <= n
        else part.sample(n, random_state=seed)
        for split, part in frame.groupby("split", sort=True)
    ]
    return pd.concat(parts).sort_index()


def profile(
    examples: ExampleSet, count_tokens: Callable[[list[str]], list[int]], max_tokens: int
) -> dict[str, float]:
    """Describe the rows: counts, lengths, repetitions, truncation to come.

    Parameters
    ----------
    examples : ExampleSet
        What `read_examples` returned.
    count_tokens : callable
        Texts → number of tokens of each, by the base model's tokenizer.
    max_tokens : int
        Length above which a row will be cut.

    Returns
    -------
    dict of str to float
        Rows per split, tasks, skipped and repeated rows, mean and largest lengths (tokens), rows
        that will be truncated. Of many rows, tokens are counted on a sample, whose size is
        ``token_sample_rows``, and truncated rows are estimated.
    """
    frame = examples.frame
    counted = frame if len(frame) <= _COUNTED else frame.sample(_COUNTED, random_state=0)
    prompts = _token_counts(counted["prompt"], count_tokens)
    responses = _token_counts(counted["response"], count_tokens)
    total = prompts + responses
    counts = {f"rows_{split}": float(n) for split, n in frame["split"].value_counts().items()}
    if len(counted) < len(frame):
        counts["token_sample_rows"] = float(len(counted))
    return counts | {
        "rows": float(len(frame)),
        "tasks": float(frame["task"].nunique()),
        "skipped_rows": float(len(examples.skipped)),
        "repeated_prompts": float(frame["prompt"].duplicated().sum()),
        "prompt_tokens_mean": float(prompts.mean()),
        "prompt_tokens_max": float(prompts.max()),
        "response_tokens_mean": float(responses.mean()),
        "response_tokens_max": float(responses.max()),
        "truncated_rows": float(round((total > max_tokens).mean() * len(frame))),
    }


def _token_counts(
    texts: "pd.Series[str]", count_tokens: Callable[[list[str]], list[int]]
) -> "pd.Series[int]":
    """Count the tokens of every text, some texts at a time."""
    counts = np.empty(len(texts), dtype=np.int64)
    for start in range(0, len(texts), _TOKENISED):
        part = texts.iloc[start : start + _TOKENISED].tolist()
        counts[start : start + len(part)] = count_tokens(part)
    return pd.Series(counts)
