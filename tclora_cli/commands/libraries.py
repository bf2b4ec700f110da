"""``tclora report``, ``verify`` and ``ui``: what runs have left."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tclora.errors import LibraryError
from tclora_cli import mlflow_server
from tclora_cli.commands.shared import console

LibraryArgument = Annotated[
    str, typer.Argument(help="Library directory of a finished run, or URL/NAME of a published one.")
]


def report(library: LibraryArgument) -> None:
    """Write report.html of a library again."""
    from tclora.library.published import library_folder
    from tclora.report import write_report

    place = write_report(library_folder(library))
    console.print(f"report: {place}", highlight=False, soft_wrap=True)


def verify(library: LibraryArgument) -> None:
    """Check every file of a library against its digest; name those that differ."""
    from tclora.library import manifest
    from tclora.library.published import library_folder

    folder = library_folder(library)
    problems = manifest.verify(folder)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    digests = manifest.read_manifest(folder).digests
    typer.echo(f"whole: {sum(map(_count_files, map(folder.joinpath, digests)))} files")


def ui(
    output: Annotated[Path, typer.Option(help="The output folder of the runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on loopback with the store of the runs."""
    from tasks.tracking import tracking_uri

    uri = tracking_uri(output)
    if uri.startswith("http"):
        console.print(
            f"MLflow runs at {uri} (MLFLOW_TRACKING_URI)", highlight=False, soft_wrap=True
        )
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise LibraryError(
            f"{output} holds no MLflow store yet; run the pipeline first or name its --output"
        )
    console.print(
        f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)", highlight=False, soft_wrap=True
    )
    command = [*mlflow_server.command(port), "--backend-store-uri", uri]
    os.execve(sys.executable, command, mlflow_server.SETTINGS | os.environ)  # noqa: S606


def _count_files(path: Path) -> int:
    """Count what a digest covers: a file, or the files of a folder in earlier libraries."""
    return sum(file.is_file() for file in path.rglob("*")) if path.is_dir() else 1
