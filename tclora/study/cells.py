"""The cells of a study: every combination of the values of its axes, as a configuration."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from tclora.cluster.registry import clusterers
from tclora.config import Config, config_keys, parse_config
from tclora.errors import ConfigError
from tclora.files import sha256_json
from tclora.library.layout import Layout
from tclora.registry import closest

# Key → its values; several keys that change together are joined by commas, their values are lists.
Axes = Mapping[str, Sequence[Any]]
_METHOD, _K = "cluster.method", "cluster.k"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes
    ----------
    values : Mapping
        Key → value on every axis, lists as text; None where it does not count, as K for a clusterer
        that finds it.
    config : Config
        Of the run.
    layout : Layout
        Where its results are, once it has run.
    """

    values: Mapping[str, Any]
    config: Config
    layout: Layout


def make_cells(config: Config, axes: Axes, folder: Path) -> list[Cell]:
    """Return the cells of a grid, each once, with libraries below a folder.

    Raises
    ------
    ConfigError
        If an axis is no key of the configuration, or a value does not fit it or them.
    """
    known = config_keys()
    for names, given in axes.items():
        _check_axis(names, given, known)
    combinations = {sha256_json(values): values for values in _combinations(axes)}
    labels = {digest: _label(values) for digest, values in combinations.items()}
    count = Counter(labels.values())
    return [
        _cell(config, values, label if count[label] == 1 else f"{label}-{digest[:8]}", folder)
        for (digest, values), label in zip(combinations.items(), labels.values(), strict=True)
    ]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Read an axis such as ``cluster.k=[4, 8]``.

    Raises
    ------
    ConfigError
        If it is not a key with a list of values.
    """
    key, sign, values = text.partition("=")
    try:
        parsed = yaml.safe_load(values) if sign else None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"axis must be KEY=[VALUE, ...], got {text!r}, whose values are not valid YAML: {error}"
        ) from error
    if not isinstance(parsed, list) or not parsed:
        raise ConfigError(f"axis must be KEY=[VALUE, ...], got {text!r}")
    return key.strip().replace(" ", ""), parsed


def _check_axis(names: str, given: Sequence[Any], known: Sequence[str]) -> None:
    keys = names.split(",")
    for key in keys:
        if key not in known:
            raise ConfigError(f"axis must be a key, got {key!r}; {closest(key, known)}")
        if key in ("name", "output"):
            raise ConfigError(f"axis must be no place, got {key!r}: every cell has its own")
    for value in given if len(keys) > 1 else ():
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(keys):
            example = ", ".join(f"VALUE{number}" for number in range(1, len(keys) + 1))
            raise ConfigError(
                f"axis {names} must have lists of {len(keys)} values, one per key, got {value!r}; "
                f"write {names}=[[{example}], ...]"
            )


def _combinations(axes: Axes) -> Iterator[dict[str, Any]]:
    for combination in product(*axes.values()):
        values: dict[str, Any] = {}
        for names, value in zip(axes, combination, strict=True):
            keys = names.split(",")
            values |= dict(zip(keys, value if len(keys) > 1 else [value], strict=True))
        method = str(values.get(_METHOD))
        if _K in values and method in clusterers and not clusterers[method].counts:
            values[_K] = None
        yield values


def _cell(config: Config, values: Mapping[str, Any], label: str, folder: Path) -> Cell:
    nested = config.model_dump(mode="json") | {"name": label, "output": str(folder)}
    nested = deepcopy(nested)
    # The same held-out rows in every cell, whatever else its seed changes.
    nested["data"]["seed"] = config.seed if config.data.seed is None else config.data.seed
    for key, value in values.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place[section]
        if value is not None:
            place[last] = value
    made = parse_config(nested, source=f"cell {label}")
    told = {k: str(v) if isinstance(v, (list, tuple, dict)) else v for k, v in values.items()}
    return Cell(told, made, Layout(made.library_dir))


def _label(values: Mapping[str, Any]) -> str:
    """Return a folder's name for a cell: the values in short, which may be those of another too."""
    parts = []
    for key, value in values.items():
        text = Path(str(value)).name if isinstance(value, str) else str(value)
        short = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
        parts.append(short if isinstance(value, str) else f"{key.rpartition('.')[2]}{short}")
    return "_".join(parts)
