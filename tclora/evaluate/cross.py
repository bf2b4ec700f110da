"""Interference as behaviour: held-out rows of every cluster under every cluster's adapter.

An adapter is measured on a cluster's rows alone, in place of the cluster's own, and added to the
own: Δ_k + Δ_j, each at its full scale. How much the loss of cluster k's rows rises when adapter j
is added is the harm that j does to k; averaging two adapters would halve both and measure that too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from tclora.adapter import Adapter, read_adapter
from tclora.config import MeasureConfig
from tclora.evaluate.measure import evaluate_frame
from tclora.files import atomic_path
from tclora.jobs.call import EventCallback
from tclora.library.names import BASE, cluster_number
from tclora.merge import merge
from tclora.model.attach import attached
from tclora.model.base import Base, LoadedBase


def measure_cross(
    *,
    base: Base,
    rows: Path,
    adapters: dict[str, Path],
    per_cluster: int,
    seed: int,
    config: MeasureConfig,
    file: Path,
    on_event: EventCallback = lambda _: None,
) -> int:
    """Measure rows of every cluster under the base model, every adapter, and every two adapters.

    Parameters
    ----------
    base : Base
        The base model.
    rows : Path
        Parquet file of canonical rows with a column cluster; those of split "test" count.
    adapters : dict of str to Path
        Adapter name → PEFT directory.
    per_cluster : int
        At most so many rows per cluster, drawn by the seed.
    seed : int
        Seed of the draw.
    config : MeasureConfig
        Of which the token budget counts; nothing is generated.
    file : Path
        Parquet file to write, one line per row and model: columns id, cluster, adapter ("base" for
        none), added (whether the adapter was added to the cluster's own, rather than alone), nll
        (nats), tokens.
    on_event : callable
        Called with the number of models measured so far, ``rows``, and in all, ``of``.

    Returns
    -------
    int
        Rows measured under each adapter alone.
    """
    loaded, frame = base.load(), pd.read_parquet(rows)
    test = frame[frame["split"] == "test"].sample(frac=1, random_state=seed)
    chosen = test.groupby("cluster").head(per_cluster).sort_index()
    read = {name: read_adapter(path, name) for name, path in adapters.items()}
    parts, models = [], 1 + len(read) + len(read) * (len(read) - 1) // 2
    for done, part in enumerate(_measured(loaded, chosen, read, config), start=1):
        parts.append(part)
        on_event({"rows": done, "of": models})
    with atomic_path(file) as fresh:
        pd.concat(parts, ignore_index=True).to_parquet(fresh)
    return len(chosen)


def _measured(
    loaded: LoadedBase, rows: pd.DataFrame, adapters: Mapping[str, Adapter], config: MeasureConfig
) -> Iterator[pd.DataFrame]:
    """Yield the measured rows of one model after the other."""
    yield _under(loaded, rows, None, config).assign(adapter=BASE, added=False)
    for name, adapter in adapters.items():
        yield _under(loaded, rows, adapter, config).assign(adapter=name, added=False)
    names = list(adapters)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            # One model serves both directions: second added to first, and first to second.
            other = {cluster_number(first): second, cluster_number(second): first}
            own = rows[rows["cluster"].isin(other)]
            both = merge([adapters[first], adapters[second]], "cat").adapter
            measured = _under(loaded, own, both, config)
            yield measured.assign(adapter=measured["cluster"].map(other), added=True)


def _under(
    loaded: LoadedBase, rows: pd.DataFrame, adapter: Adapter | None, config: MeasureConfig
) -> pd.DataFrame:
    with attached(loaded.model, adapter):
        measured = evaluate_frame(
            loaded.model,
            loaded.tokenizer,
            rows,
            template=loaded.base.template,
            max_tokens=loaded.base.max_tokens,
            token_budget=config.token_budget,
            max_new_tokens=None,
        )
    return measured[["id", "nll", "tokens"]].assign(cluster=rows["cluster"].to_numpy())
