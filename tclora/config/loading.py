"""Reading, overriding and validating a configuration, all problems at once."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tclora.config.run import Config
from tclora.config.section import Section
from tclora.errors import ConfigError

logger = logging.getLogger(__name__)

# Keys of version 0.1.0 that have another name now; they go with the next version.
RENAMED = {
    "route.mode": "route.router",
    "merge.calibration_rows": "merge.sample_rows",
    "merge.refine_steps": "merge.refit_steps",
    "evaluate.harness": "evaluate.lm_eval",
    "evaluate.harness_limit": "evaluate.lm_eval_limit",
}


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and validate everything.

    Parameters
    ----------
    source : str, Path or mapping, optional
        YAML file or nested mapping; the defaults alone if None.
    overrides : sequence of str
        ``"train.epochs=1"``; values are YAML.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        With every problem found: unreadable file, unknown keys, wrong types or values.
    """
    if isinstance(source, Mapping):
        values, name = dict(source), "configuration"
    elif source is None:
        values, name = {}, "configuration"
    else:
        values, name = _read_yaml(Path(source)), str(source)
    values = _renamed(values, name)
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, source=name)


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a nested mapping; see `load_config`."""
    try:
        return Config.model_validate(_renamed(values, source))
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{source} has {len(problems)} problem(s):\n{listing}") from None


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List the dotted keys of every section and field, in file order."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += config_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _renamed(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a copy with today's names of renamed keys, each with a notice.

    Raises
    ------
    ConfigError
        If a key has both of its names.
    """
    values = deepcopy(values)
    for old, new in RENAMED.items():
        (*before, last), (*after, fresh) = old.split("."), new.split(".")
        section = _section(values, before)
        if last not in section:
            continue
        target = _section(values, after, create=True)
        if fresh in target:
            raise ConfigError(f"{source} must have {new} alone, got {old} too, its former name")
        _notify(source, old)
        target[fresh] = section.pop(last)
    return values


def _notify(source: str, old: str) -> None:
    logger.warning(
        "%s: %s is now %s; the former name goes with the next version", source, old, RENAMED[old]
    )


def _section(values: dict[str, Any], path: Sequence[str], create: bool = False) -> dict[str, Any]:
    """Return a nested section; an empty one, put in place if asked to, where there is none."""
    for name in path:
        nested = values.setdefault(name, {}) if create else values.get(name)
        if not isinstance(nested, dict):
            return {}
        values = nested
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override must be key=value, got {override!r}")
    key = key.strip()
    if key in RENAMED:
        _notify("--set", key)
        key = RENAMED[key]
    *sections, last = key.split(".")
    for section in sections:
        nested = values.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        values = nested
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _describe(problem: Any) -> str:  # noqa: ANN401
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, config_keys(), n=1) or [
            known for known in config_keys() if known.endswith(f".{key}")
        ]
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "model_type":
        return f"{key}: must be a section of keys and values, got {problem['input']!r}"
    message: str = problem["msg"].removeprefix("Value error, ")
    if not key:  # of several keys, which the message names
        return message
    return (
        f"{key}: {message}"
        if problem["type"] == "value_error"
        else (f"{key}: {message}, got {problem['input']!r}")
    )


def _is_union_tag(part: Any) -> bool:  # noqa: ANN401
    """Whether pydantic put the name of a union's member in an error's location."""
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "constrained-int"})
