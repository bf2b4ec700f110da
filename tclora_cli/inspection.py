"""``tclora methods`` and ``tclora inspect``: tables of merge methods and of adapters."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tclora.adapter.union import module_names
from tclora.merge import MethodInfo, methods
from tclora_cli.folders import read_adapters
from tclora_cli.tables import print_whole

if TYPE_CHECKING:
    from tclora.tensor.interference import Interference


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
    from tclora.tensor.interference import MEASURES, interference

    adapters = read_adapters(specs)
    table = Table("adapter", "modules", "ranks", "norm of update", "base model")
    for adapter in adapters:
        ranks, square = set(), 0.0
        for module in track(
            module_names([adapter]),
            adapter.name,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            B, A = adapter.modules[module]
            ranks.add(A.shape[0])
            square += float(((B.T.double() @ B.double()) * (A.double() @ A.T.double())).sum())
        table.add_row(
            adapter.name, str(len(adapter.modules)), ", ".join(map(str, sorted(ranks))),
            f"{square**0.5:.4g}", adapter.base_model or "-",
        )  # fmt: skip
    print_whole(table, console)
    if len(adapters) > 1:
        measured = interference(adapters)
        for name in MEASURES:
            print_whole(_matrix(name.replace("_", " "), getattr(measured, name)), console)
        if picture:
            _draw(measured, picture)
            console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def _matrix(title: str, frame: Any) -> Table:  # noqa: ANN401
    table = Table("", *frame.columns, title=title, title_justify="left")
    for name, row in frame.iterrows():
        table.add_row(str(name), *(f"{value:.3f}" for value in row))
    return table


def _draw(measured: "Interference", picture: Path) -> None:
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
