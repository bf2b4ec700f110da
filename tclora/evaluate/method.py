"""The jobs that measure one method on the held-out rows: adapters, or a routed library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedModel

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.evaluate.context import RowContext
from tclora.evaluate.lm_eval import run_lm_eval
from tclora.evaluate.measure import evaluate_frame
from tclora.files import atomic_path
from tclora.jobs.call import EventCallback
from tclora.model.base import Base, LoadedBase
from tclora.route import Gating, read_library
from tclora.route.routing import routing_from_table

ALL = "all"  # the key of an adapter that answers for every row
_LABELS = ["split", "task", "cluster", "prompt", "answer"]


def evaluate_adapters(
    *,
    name: str,
    base: Base,
    rows: Path,
    adapters: dict[str, Path],
    config: MeasureConfig,
    target: Path,
    lm_eval: LmEvalConfig | None = None,
    lm_eval_target: Path | None = None,
    on_event: EventCallback = lambda _: None,
) -> int:
    """Measure the base model with adapters on held-out rows.

    Parameters
    ----------
    name : str
        Name of the method.
    base : Base
        The base model.
    rows : Path
        Parquet file of canonical rows with a column cluster.
    adapters : dict of str to Path
        PEFT directories: one for `ALL` rows, one per cluster's number (rows of other clusters are
        left out), or none for the base model.
    config : MeasureConfig
        What to measure.
    target : Path
        Parquet file of the measured items.
    lm_eval, lm_eval_target
        lm-eval tasks to run on the model as well, and the Parquet file of their figures.
    on_event : callable
        Called with the number of rows measured so far, ``rows``, and in all, ``of``.

    Returns
    -------
    int
        Rows measured.
    """
    loaded, frame = base.load(), pd.read_parquet(rows)
    model: Any = loaded.model
    parts: list[pd.DataFrame] = []
    for key, group in _groups(frame, adapters):
        model = _activate(model, key, adapters.get(key))
        parts.append(_measured(loaded._replace(model=model), group, config))
        on_event({"rows": sum(map(len, parts)), "of": len(frame)})
    items = _write_items(parts, name, target)
    if lm_eval and lm_eval_target:
        figures = run_lm_eval(
            model,
            loaded.tokenizer,
            lm_eval.lm_eval,
            limit=lm_eval.lm_eval_limit,
            allow_code_execution=lm_eval.allow_code_execution,
        )
        with atomic_path(lm_eval_target) as fresh:
            figures.assign(method=name).to_parquet(fresh)
    return items


def evaluate_routed(
    *,
    name: str,
    base: Base,
    rows: Path,
    library: Path,
    routing: Path,
    config: MeasureConfig,
    target: Path,
    on_event: EventCallback = lambda _: None,
) -> int:
    """Measure a routed library on held-out rows, each by its own route.

    Parameters
    ----------
    name, base, rows, config, target, on_event
        See `evaluate_adapters`.
    library : Path
        Directory of the routed library.
    routing : Path
        Parquet file of the rows' routing, in their order.

    Returns
    -------
    int
        Rows measured.
    """
    loaded, frame = base.load(), pd.read_parquet(rows)
    model, context = _gated(loaded.model, library, routing)
    items = _measured(loaded._replace(model=model), frame, config, context)
    on_event({"rows": len(items), "of": len(frame)})
    return _write_items([items], name, target)


def _groups(
    frame: pd.DataFrame, adapters: Mapping[str, Path]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the key of an adapter and the rows it answers for."""
    if not adapters or ALL in adapters:
        yield ALL, frame
        return
    for cluster, rows in frame.groupby("cluster", sort=True):
        if str(cluster) in adapters:
            yield str(cluster), rows


def _activate(model: Any, key: str, path: Path | None) -> Any:  # noqa: ANN401
    """Return the model with one adapter active, as stock PEFT loads it, or as it is."""
    if path is None:
        return model
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, path, key, autocast_adapter_dtype=False).eval()
    previous = model.active_adapter
    model.load_adapter(path, key, autocast_adapter_dtype=False)
    model.set_adapter(key)
    model.delete_adapter(previous)
    return model.eval()


def _gated(model: PreTrainedModel, folder: Path, routing: Path) -> tuple[Any, RowContext]:
    """Return the model with a routed library's adapter, and the context that gates given rows."""
    library = read_library(folder)
    adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    gating = Gating(adapted, library.gated)
    routed = routing_from_table(pd.read_parquet(routing), library.gated.names)
    return adapted, lambda rows: routed.take(rows).context(gating)


def _measured(
    loaded: LoadedBase,
    rows: pd.DataFrame,
    config: MeasureConfig,
    context: RowContext | None = None,
) -> pd.DataFrame:
    measured = evaluate_frame(
        loaded.model,
        loaded.tokenizer,
        rows,
        template=loaded.base.template,
        max_tokens=loaded.base.max_tokens,
        token_budget=config.token_budget,
        max_new_tokens=config.max_new_tokens if config.generate else None,
        **({"context": context} if context else {}),
    )
    return pd.concat([measured, rows[_LABELS].reset_index(drop=True)], axis=1)


def _write_items(parts: list[pd.DataFrame], method: str, target: Path) -> int:
    items = pd.concat(parts, ignore_index=True).assign(method=method)
    with atomic_path(target) as fresh:
        items.to_parquet(fresh)
    return len(items)
