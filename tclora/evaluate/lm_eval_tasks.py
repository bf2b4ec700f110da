"""What lm-eval's tasks are, from their configurations alone: no data and no model is loaded."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tclora.errors import ConfigError
from tclora.evaluate.lm_eval import YAML
from tclora.files import sha256_file
from tclora.registry import closest

TaskConfig = Mapping[str, Any]
_FUNCTION = re.compile(r"/.{1,999}/\w+(\.\w+)+")  # folder and dotted name
ROLLING = "loglikelihood_rolling"  # output type of tasks that measure perplexity of whole texts


def check_lm_eval(names: Sequence[str]) -> dict[str, list[TaskConfig]]:
    """Refuse lm-eval tasks that do not exist or cannot be measured, before anything is loaded.

    Parameters
    ----------
    names : sequence of str
        Names of tasks, groups and tags of lm-eval, or YAML files.

    Returns
    -------
    dict of str to list of mapping
        Name → configuration of the task, or of each task of the group or tag.

    Raises
    ------
    ConfigError
        If lm-eval is missing or does not know a task, or a task measures perplexity.
    """
    if not names:
        return {}
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ConfigError(
            f"task {names[0]!r} is no file, and for one of lm-eval's it must be installed: "
            "pip install tclora[lm-eval]"
        ) from error
    files = [name for name in names if Path(name).is_file() and name.endswith(YAML)]
    index = _index() if set(names) - set(files) else {}
    found = {}
    for name in names:
        if name in files:
            found[name] = list(_parts(load_yaml(name, resolve_func=False), index))
        elif name in index:
            found[name] = list(_named(name, index))
        else:
            raise ConfigError(
                f"task must be a file of rows or one of lm-eval's, got {name!r}; "
                f"{closest(name, index)}"
            )
        if any(config.get("output_type") == ROLLING for config in found[name]):
            raise ConfigError(no_perplexity(name))
    return found


@cache
def _index() -> Mapping[str, Any]:
    """Return what lm-eval knows; it reads some thousand files for that."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


def no_perplexity(name: str) -> str:
    """Say that a task cannot be measured since it asks for the perplexity of whole texts."""
    return (
        f"lm-eval's task {name!r} measures the perplexity of whole texts ({ROLLING}), which has "
        "no prompts to answer; leave it out"
    )


def written_task(file: Path) -> list[object]:
    """Return what a task file says with all that it includes, and its functions' digests.

    Parameters
    ----------
    file : Path
        YAML.

    Notes
    -----
    Of functions the modules beside the file count that it names them in, whole, but not what these
    import; of a dataset its name alone.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(file, resolve_func=False)
    modules = {module for text in _texts(config) if (module := _module(text)) and module.is_file()}
    return [config, [sha256_file(module) for module in sorted(modules)]]


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of a configuration."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _module(text: str) -> Path | None:
    """Return the module of a function as lm-eval writes one that it has not imported; else None."""
    if not _FUNCTION.fullmatch(text):
        return None
    folder, _, name = text.rpartition("/")
    return Path(folder) / f"{name.rpartition('.')[0].replace('.', '/')}.py"


def _named(name: str, index: Mapping[str, Any]) -> Iterator[TaskConfig]:
    """Yield the configurations of a task, a group or a tag of lm-eval's index."""
    entry = index[name]
    if entry.cfg is not None:
        yield from _parts(entry.cfg, index)
        return
    for task in sorted(entry.tags):
        yield from _named(task, index)


def _parts(config: TaskConfig, index: Mapping[str, Any]) -> Iterator[TaskConfig]:
    """Yield the configuration of a task, or those of a group's tasks with what it changes."""
    inside = config.get("task")
    if not isinstance(inside, list):
        yield config
        return
    for part in inside:
        own = {"task": part} if isinstance(part, str) else part
        name = own.get("task", own.get("group"))
        if isinstance(name, str) and name in index:
            changed = {key: value for key, value in own.items() if key not in {"task", "group"}}
            yield from ({**found, **changed} for found in _named(name, index))
        else:
            yield from _parts(own, index)
