"""``tclora merge``: adapters of other directories into one, and what became of them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from tclora.adapter import write_adapter
from tclora.errors import AdapterError
from tclora.merge import merge, methods
from tclora_cli.folders import check_target, read_adapters
from tclora_cli.sampling import SampleSource, settings_from_sample


def merge_directories(
    specs: Sequence[str],
    output: Path,
    method: str,
    *,
    sample: SampleSource | None,
    console: Console,
    options: Sequence[str] = (),
    **settings: Any,  # noqa: ANN401
) -> None:
    """Merge adapters into one and say what became of them; `settings` go to `merge`."""
    check_target(output)
    adapters = read_adapters(specs)
    chosen = parse_options(options)
    known = {name for info in methods() if info.name == method for name in info.options}
    if strange := sorted(set(chosen) - known):
        raise AdapterError(
            f"--option {strange[0]!r} must be one of {method}'s own: {sorted(known) or 'none'}"
        )
    with tempfile.TemporaryDirectory(prefix="tclora-statistics-") as folder, _bar(console) as bar:
        try:
            if sample:
                settings |= settings_from_sample(
                    sample, adapters, Path(folder), method, {**settings, **chosen}
                )
            task = bar.add_task(f"merging by {method}", total=None)
            merged = merge(
                adapters,
                method,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                **settings,
                **chosen,
            )
        except ValueError as error:
            raise AdapterError(str(error)) from error
    write_adapter(merged.adapter, output)
    lines = [
        ("method", merged.method),
        ("rank", str(merged.rank)),
        ("parameters", f"{merged.parameters:,}"),
        ("lost by truncation", f"{merged.truncation_loss:.2%} of the energy"),
        *[("note", note) for note in merged.notes],
        ("merged adapter", str(output)),
    ]
    for label, value in lines:
        console.print(f"{label:<20}{value}", highlight=False, markup=False, soft_wrap=True)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` strings into a method's options; values are YAML."""
    pairs = [option.partition("=") for option in options]
    bad = [option for option, (_, sign, _) in zip(options, pairs, strict=True) if not sign]
    if bad:
        raise AdapterError(f"options must be key=value, got {', '.join(bad)}")
    try:
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise AdapterError(f"options must be key=value with a YAML value: {error}") from error


def _bar(console: Console) -> Progress:
    """Return a progress bar that a terminal shows and a file does not."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)
