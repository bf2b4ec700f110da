"""The jobs that measure one method on the held-out rows: adapters, or a routed library."""

from pathlib import Path

import pandas as pd

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.evaluate.subjects import Adapted, Routed, opened
from tclora.files import atomic_path
from tclora.jobs.call import EventCallback
from tclora.model.base import Base
from tclora.route import read_library
from tclora.route.routing import routing_from_table

LABELS = ("split", "task", "skills", "cluster", "prompt", "answer")


def evaluate_adapters(
    *,
    name: str,
    base: Base,
    rows: Path,
    adapters: dict[str, Path],
    config: MeasureConfig,
    file: Path,
    lm_eval: LmEvalConfig | None = None,
    lm_eval_file: Path | None = None,
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
        left out), or none for the base model; see `tclora.evaluate.subjects`.
    config : MeasureConfig
        What to measure.
    file : Path
        Parquet file of the measured items.
    lm_eval, lm_eval_file
        lm-eval tasks to run on the model as well, and the Parquet file of their figures.
    on_event : callable
        Called with the number of rows measured so far, ``rows``, and in all, ``of``.

    Returns
    -------
    int
        Rows measured.
    """
    loaded, frame = base.load(), pd.read_parquet(rows)
    with opened(Adapted(loaded, adapters)) as subject:
        measured = _write_items(subject.measure(frame, config, on_event), frame, name, file)
        if lm_eval and lm_eval_file:
            figures = subject.run_lm_eval(lm_eval, config.token_budget).figures
            with atomic_path(lm_eval_file) as fresh:
                figures.assign(method=name).to_parquet(fresh)
    return measured


def evaluate_routed(
    *,
    name: str,
    base: Base,
    rows: Path,
    library: Path,
    routing: Path,
    config: MeasureConfig,
    file: Path,
    on_event: EventCallback = lambda _: None,
) -> int:
    """Measure a routed library on held-out rows, each by its own route.

    Parameters
    ----------
    name, base, rows, config, file, on_event
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
    names = read_library(library).gated.names
    known = routing_from_table(pd.read_parquet(routing), names)
    with opened(Routed(loaded, library, lambda _: known)) as subject:
        return _write_items(subject.measure(frame, config, on_event), frame, name, file)


def with_labels(measured: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return measurements, which have the rows' index, beside what tables say of the rows."""
    labels = [name for name in LABELS if name in rows]
    return measured.join(rows[labels]).reset_index(drop=True)


def _write_items(measured: pd.DataFrame, rows: pd.DataFrame, method: str, file: Path) -> int:
    with atomic_path(file) as fresh:
        with_labels(measured, rows).assign(method=method).to_parquet(fresh)
    return len(measured)
