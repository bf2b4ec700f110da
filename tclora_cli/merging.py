"""The command line's work on adapters alone: list methods, merge and inspect PEFT directories."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from tclora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    locate_adapter,
    read_adapter,
    write_adapter,
)
from tclora.adapter.union import module_names
from tclora.errors import AdapterError
from tclora.merge import MethodInfo, merge, methods
from tclora.model.locate import (
    choose_dtype,
    default_device,
    load_base_model,
    load_tokenizer,
    locate_base_model,
)
from tclora.tensor.interference import Interference, interference
from tclora.tune.rows import calibration_batches, collect_all, read_calibration
from tclora.tune.scale import is_scaled, tune_scale


@dataclass(frozen=True)
class Calibration:
    """Where `merge_directories` takes activation statistics from.

    Attributes
    ----------
    sources : sequence of str
        ``NAME=FILE``, or files with a column ``adapter``.
    base : str or None
        Base model; what the adapters name if None.
    template : str
        "chat" or "plain".
    rows : int
        At most this many rows per adapter.
    scales : sequence of float
        Grid from which the method's scale is taken; empty: the method's own.
    """

    sources: Sequence[str]
    base: str | None
    template: str
    rows: int
    scales: Sequence[float] = ()


def read_adapters(specs: Sequence[str]) -> list[Adapter]:
    """Open PEFT directories or hub ids, named after their folders, with parents if need be."""
    paths = [locate_adapter(spec) for spec in specs]
    names = [Path(spec).name for spec in specs]
    unique = [
        name if names.count(name) == 1 else f"{Path(spec).parent.name}-{name}"
        for name, spec in zip(names, specs, strict=True)
    ]
    return [read_adapter(path, name) for path, name in zip(paths, unique, strict=True)]


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


def check_target(target: Path) -> None:
    """Refuse to replace a directory that is more than an adapter.

    Raises
    ------
    AdapterError
        If `target` is a file, or a directory that holds anything but one PEFT adapter.
    """
    if not target.exists():
        return
    ours = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    others = [] if target.is_dir() else [target]
    others += [path for path in target.glob("*") if path.name not in ours]
    if others:
        raise AdapterError(
            f"--output {str(target)!r} must be a new directory or one that holds an adapter alone, "
            f"but {others[0].name!r} is there; name another one"
        )


def merge_directories(
    specs: Sequence[str],
    output: Path,
    method: str,
    *,
    calibration: Calibration | None,
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
            if calibration:
                settings |= _calibrate(
                    calibration, adapters, Path(folder), method, {**settings, **chosen}
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


def _bar(console: Console) -> Progress:
    """Return a progress bar that a terminal shows and a file does not."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _calibrate(
    calibration: Calibration,
    adapters: Sequence[Adapter],
    folder: Path,
    method: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the adapters' base model on the calibration rows: statistics, and a scale if asked for.

    Returns what `merge` is to be given beside its settings.
    """
    if calibration.scales and "scale" in settings:
        raise AdapterError("--scales and --option scale=… exclude each other")
    if calibration.scales and not is_scaled(method):
        raise AdapterError(f"--scales needs a method with a scale, {method} has none")
    rows = read_calibration(
        calibration.sources, [adapter.name for adapter in adapters], calibration.rows
    )
    base = calibration.base or next((a.base_model for a in adapters if a.base_model), None)
    if base is None:
        raise AdapterError("--calibration needs --base: the adapters do not name their base model")
    location = locate_base_model(base)
    device = default_device()
    model = load_base_model(location, choose_dtype("auto", device), device)
    tokenizer = load_tokenizer(location)
    template = calibration.template
    statistics = collect_all(model, tokenizer, rows, adapters, folder, template=template)
    if not calibration.scales:
        return {"statistics": statistics}
    found = tune_scale(
        model,
        adapters,
        method,
        calibration_batches(tokenizer, rows, template=template),
        calibration.scales,
        statistics=statistics,
        **settings,
    )
    return {"statistics": statistics, "scale": found.scale}


def method_rows() -> list[dict[str, Any]]:
    """Describe every merge method as plain values."""
    return [{**asdict(info), "options": dict(info.options)} for info in methods()]


def methods_table() -> Table:
    """Table of merge methods."""
    table = Table("method", "needs", "exact", "what it does", "paper")
    for info in methods():
        table.add_row(
            info.name, info.needs, "yes" if info.exact else "no", _summary(info), info.paper
        )
    return table


def _summary(info: MethodInfo) -> str:
    options = ", ".join(f"{key}={value}" for key, value in info.options.items())
    return info.summary + (f" [{options}]" if options else "")


def print_inspection(specs: Sequence[str], picture: Path | None, console: Console) -> None:
    """Print ranks, targets and norms of adapters and how they interfere; draw it if asked to."""
    adapters = read_adapters(specs)
    table = Table("adapter", "modules", "ranks", "norm of update", "base model")
    for adapter in adapters:
        ranks, square = set(), 0.0
        for module in track(module_names([adapter]), adapter.name, console=console, transient=True):
            B, A = adapter.modules[module]
            ranks.add(A.shape[0])
            square += float(((B.T.double() @ B.double()) * (A.double() @ A.T.double())).sum())
        table.add_row(
            adapter.name, str(len(adapter.modules)), ", ".join(map(str, sorted(ranks))),
            f"{square**0.5:.4g}", adapter.base_model or "-",
        )  # fmt: skip
    console.print(table)
    if len(adapters) > 1:
        measured = interference(adapters)
        for name in ("cosine", "input_overlap", "output_overlap", "sign_conflict"):
            console.print(_matrix(name.replace("_", " "), getattr(measured, name)))
        if picture:
            _draw(measured, picture)
            console.print(f"picture: {picture}", highlight=False)


def _matrix(title: str, frame: Any) -> Table:  # noqa: ANN401
    table = Table("", *frame.columns, title=title, title_justify="left")
    for name, row in frame.iterrows():
        table.add_row(str(name), *(f"{value:.3f}" for value in row))
    return table


def _draw(measured: Interference, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    names = ("cosine", "input_overlap", "output_overlap", "sign_conflict")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        frame = getattr(measured, name)
        signed = name == "cosine"
        image = axes.imshow(
            frame, vmin=-1 if signed else 0, vmax=1, cmap="RdBu_r" if signed else "Blues"
        )
        axes.set_title(name.replace("_", " "))
        axes.set_xticks(range(len(frame)), frame.columns, rotation=45, ha="right")
        axes.set_yticks(range(len(frame)), frame.index)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(picture, dpi=130)
