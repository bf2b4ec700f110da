"""The flows that are deployed: a server shows their parameters as a form and refuses bad values.

Whoever may start a run can name places, so these are checked: all are in the folder that the
worker's environment names in ``$TCLORA_ROOT``, and relative ones are below it.
"""

import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from prefect import flow
from pydantic import Field

from flows.pipeline import NAME, run
from flows.study import study
from tclora.config import Config, load_config
from tclora.errors import ConfigError
from tclora.registry import load_plugins
from tclora.study.registry import studies

ROOT = "TCLORA_ROOT"
Step = Literal["prepare", "train", "merge", "evaluate", "publish"]
Override = Annotated[str, Field(pattern=r"^[a-z0-9_.]+=", description="such as train.epochs=1")]
StudyName = Annotated[str, Field(json_schema_extra={"enum": sorted(studies)})]


@flow(name=NAME)
def run_pipeline(
    config: Config = Config(),  # noqa: B008  # frozen
    overrides: list[Override] = [],  # noqa: B006  # Prefect copies it
    until: Step = "publish",
) -> dict[str, str]:
    """Run the TC-LoRA pipeline on the worker's machine.

    Parameters
    ----------
    config : Config
        What `tclora config` prints; missing keys are at their defaults.
    overrides : list of str
        Settings in place of the configuration's, such as "train.epochs=1".
    until : str
        Last step: prepare, train, merge, evaluate or publish.

    Returns
    -------
    dict of str to str
        See `flows.pipeline.pipeline`.

    Raises
    ------
    ConfigError
        If an override is not valid, or a place leads where it must not.
    """
    load_plugins()
    settled = load_config(config.model_dump(mode="json"), overrides)
    with chdir(allowed_root()):
        check_places(settled)
        return run(settled, until)


@flow(name="study")
def run_study(
    name: StudyName,
    config: Config = Config(),  # noqa: B008  # frozen
    overrides: list[Override] = [],  # noqa: B006  # Prefect copies it
    axes: dict[str, list[Any]] = {},  # noqa: B006  # Prefect copies it
) -> dict[str, str]:
    """Run a grid of settings on the worker's machine.

    Parameters
    ----------
    name : str
        Which study.
    config : Config
        What all cells have in common.
    overrides : list of str
        Settings in place of the configuration's, such as "train.epochs=1".
    axes : dict of str to list
        Values of keys in place of the study's own, or beside them.

    Returns
    -------
    dict of str to str
        See `flows.study.study`.

    Raises
    ------
    ConfigError
        If an override or an axis is not valid, or a place leads where it must not.
    """
    load_plugins()
    if strange := [key for key in axes if key in _FIXED]:
        raise ConfigError(f"axes must vary no places, got {', '.join(strange)}")
    settled = load_config(config.model_dump(mode="json"), overrides)
    with chdir(allowed_root()):
        check_places(settled)
        return study(name, settled, axes)


_PLACES = (
    "output", "base_model", "embed.model", "embed.vectors", "data.path", "data.test_path",
    "data.ood_path", "data.composition_path",
)  # fmt: skip
_STORES = ("execution.store", "publish_to")
_OF_DISKS = ("file", "local")  # schemes of URLs whose path is one of this machine
_FIXED = (*_PLACES, *_STORES, "evaluate.lm_eval")


def allowed_root() -> Path:
    """Return the folder that deployed runs may read and write.

    Raises
    ------
    ConfigError
        If the environment names none.
    """
    root = os.environ.get(ROOT)
    if not root or not Path(root).is_dir():
        raise ConfigError(
            f"{ROOT} must be, in the worker's environment, the folder that runs read and write, "
            f"got {root!r}; name one that exists"
        )
    return Path(root).resolve()


def check_places(config: Config) -> None:
    """Refuse places of a configuration that lead out of this folder, the allowed one.

    Raises
    ------
    ConfigError
        Naming each.
    """
    root = Path.cwd()
    problems = [
        f"{key} must be below {root} (${ROOT} of the worker), got {place!r}"
        for key, place in _places(config)
        if not _is_allowed(place, root)
    ]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the parameters name places that are not allowed:\n{listing}")


def _places(config: Config) -> Iterator[tuple[str, str]]:
    for key in (*_PLACES, *_STORES):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if key in _STORES and value is not None:
            parts = urlsplit(value)
            value = parts.path if parts.scheme in _OF_DISKS else None
        if value is not None:
            yield key, str(value)
    for task in config.evaluate.lm_eval:  # a file of a task may name code beside it
        if PurePath(task).suffix or len(PurePath(task).parts) > 1:
            yield "evaluate.lm_eval", task


def _is_allowed(place: str, root: Path) -> bool:
    """Whether a place is below the root; ids of the hub and built-in names are too."""
    if ".." in PurePath(place).parts:
        return False
    return Path(place).resolve().is_relative_to(root)
