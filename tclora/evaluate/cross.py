"""Interference as behaviour: every cluster's held-out rows under every cluster's adapter.

The diagonal of the table is what specialisation gains over the base model; a cell beside it, what
an adapter does to rows of a cluster that it was not trained on.
"""

from pathlib import Path

import pandas as pd

from tclora.adapter import read_adapter
from tclora.config import MeasureConfig
from tclora.evaluate.measure import evaluate_frame
from tclora.files import atomic_path
from tclora.jobs.call import EventCallback
from tclora.library.names import BASE
from tclora.model.attach import attached
from tclora.model.base import Base


def measure_cross(
    *,
    base: Base,
    rows: Path,
    adapters: dict[str, Path],
    per_cluster: int,
    seed: int,
    config: MeasureConfig,
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> int:
    """Measure the response NLL of rows of every cluster under the base model and every adapter.

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
    target : Path
        Parquet file to write: columns cluster, adapter ("base" for none), n (rows), nll (nats per
        response token).
    on_event : callable
        Called with the number of adapters measured so far, ``rows``, and in all, ``of``.

    Returns
    -------
    int
        Rows measured under each adapter.
    """
    loaded, frame = base.load(), pd.read_parquet(rows)
    test = frame[frame["split"] == "test"].sample(frac=1, random_state=seed)
    chosen = test.groupby("cluster").head(per_cluster).sort_index()
    tables = []
    for done, name in enumerate([BASE, *adapters], start=1):
        adapter = read_adapter(adapters[name], name) if name in adapters else None
        with attached(loaded.model, adapter):
            measured = evaluate_frame(
                loaded.model,
                loaded.tokenizer,
                chosen,
                template=loaded.base.template,
                max_tokens=loaded.base.max_tokens,
                token_budget=config.token_budget,
                max_new_tokens=None,
            )
        sums = measured.groupby(chosen["cluster"].to_numpy())[["nll", "tokens"]].sum()
        table = pd.DataFrame({"cluster": sums.index, "adapter": name})
        table["n"] = chosen.groupby("cluster").size().to_numpy()
        table["nll"] = (sums["nll"] / sums["tokens"]).to_numpy()
        tables.append(table)
        on_event({"rows": done, "of": len(adapters) + 1})
    with atomic_path(target) as fresh:
        pd.concat(tables, ignore_index=True).to_parquet(fresh)
    return len(chosen)
