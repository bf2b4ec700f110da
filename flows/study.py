"""A study: the pipeline over a grid of overrides, then one table, one plot, one summary."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prefect import flow, get_run_logger

from flows.pipeline import checked_pipeline
from tasks.shared import forget_stages
from tclora.config import Config
from tclora.errors import ConfigError, JobError, TcloraError
from tclora.library.layout import Layout
from tclora.preflight import Models, check_data, check_models
from tclora.preflight.methods import method_problems, variant_problems
from tclora.study.cells import Axes, Cell, make_cells
from tclora.study.registry import studies
from tclora.study.write import StudyLayout, write_study


@flow(name="study", validate_parameters=False)
def study(name: str, config: Config, axes: Axes) -> dict[str, str]:
    """Run a study.

    Parameters
    ----------
    name : str
        Registered name of the study.
    config : Config
        What all cells have in common. Their libraries, table, plot and summary go to the folder
        NAME-STUDY beside the configuration's own library.
    axes : Axes
        Values of keys in place of the study's own, or beside them.

    Returns
    -------
    dict of str to str
        The study's folder, and its summary.

    Raises
    ------
    ConfigError
        If a cell's configuration is not valid, or the cells could tell nothing; nothing has run.
    JobError
        If cells failed; the summary tells of the others, and a new run repeats the failed ones.

    Notes
    -----
    Cells run one after the other, each with its jobs beside each other. What two cells would both
    do is done once: finished stages are shared. A run that was interrupted goes on where it was.
    """
    kind = studies[name]
    layout = StudyLayout(config.library_dir.with_name(f"{config.name}-{name}"))
    cells = make_cells(config, {**kind.axes, **axes}, layout.folder)
    kind.check(cells)
    models = _check(cells)
    done, failed = [], {}
    for number, cell in enumerate(cells, start=1):
        label = cell.config.name
        get_run_logger().info("cell %d of %d: %s", number, len(cells), label)
        try:
            found = checked_pipeline(cell.config, models[label], kind.until, layout.records)
        except TcloraError as error:
            get_run_logger().error("cell %s failed: %s", label, error)
            failed[label] = str(error)
        else:
            done.append(replace(cell, layout=Layout(Path(found["library"]))))
    if done:
        outcome = kind.summarise(done, kind.control, config.evaluate)
        write_study(layout, f"{config.name}: {kind.summary}", outcome)
    if failed:
        raise JobError(_failures(failed, len(cells)))
    for cell in cells:
        forget_stages(cell.config)
    return {"folder": str(layout.folder), "summary": str(layout.summary)}


def _check(cells: Sequence[Cell]) -> dict[str, Models]:
    """Check every cell before anything runs; return the models of each."""
    problems: list[str] = []
    found: dict[tuple[str, str, str], Models] = {}
    models = {}
    for cell in cells:
        check_data(cell.config)
        problems += method_problems(cell.config) + variant_problems(cell.config)
        train = cell.config.train.model_dump_json()
        key = (cell.config.base_model, cell.config.embed.model, train)
        if key not in found:
            found[key] = check_models(cell.config)
        models[cell.config.name] = found[key]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise ConfigError(f"the study cannot start:\n{listing}")
    return models


def _failures(failed: Mapping[str, str], cells: int) -> str:
    listing = "\n".join(f"  - {label}: {error}" for label, error in failed.items())
    return (
        f"{len(failed)} of {cells} cells failed; the others are kept and a new run repeats these "
        f"only:\n{listing}"
    )
