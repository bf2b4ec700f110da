"""The command line's work on adapters alone: list methods, merge and inspect PEFT directories."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tclora.adapter import Adapter, read_adapter, write_adapter
from tclora.errors import AdapterError
from tclora.interference import Interference, interference
from tclora.merge import MethodInfo, merge, methods
from tclora.tensor.compress import module_names


def read_adapters(paths: Sequence[Path]) -> list[Adapter]:
    """Open PEFT directories, named after their folders; repeated names get a number."""
    names = [path.name for path in paths]
    unique = [
        name if names.count(name) == 1 else f"{path.parent.name}-{name}"
        for name, path in zip(names, paths, strict=True)
    ]
    return [read_adapter(path, name) for path, name in zip(paths, unique, strict=True)]


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` strings into a method's options; values are YAML."""
    pairs = [option.partition("=") for option in options]
    bad = [option for option, (_, sign, _) in zip(options, pairs, strict=True) if not sign]
    if bad:
        raise AdapterError(f"options must be key=value, got {', '.join(bad)}")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def merge_directories(
    paths: Sequence[Path],
    output: Path,
    method: str,
    *,
    rank: int | None,
    weights: Sequence[float] | None,
    options: Sequence[str],
    force: bool,
    console: Console,
) -> None:
    """Merge PEFT directories into one and say what became of them."""
    adapters = read_adapters(paths)
    try:
        merged = merge(
            adapters,
            method,
            rank=rank,
            weights=weights or None,
            force=force,
            **parse_options(options),
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


def print_inspection(paths: Sequence[Path], picture: Path | None, console: Console) -> None:
    """Print ranks, targets and norms of adapters and how they interfere; draw it if asked to."""
    adapters = read_adapters(paths)
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
