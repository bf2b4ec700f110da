"""``tclora up``, ``down`` and ``status``: servers, pools and workers of this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tclora_cli.commands.shared import console, settle_environment

if TYPE_CHECKING:
    from tclora_cli.services import Machine

FolderOption = Annotated[
    Path,
    typer.Option(
        "--folder",
        envvar="TCLORA_MACHINE",
        help="Where servers keep their state, logs and what was started.",
    ),
]
FOLDER = Path("~/.local/share/tclora")


def up(
    folder: FolderOption = FOLDER,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that runs read and write.", show_default="the current one"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs at once.", show_default="one per GPU, or core")
    ] = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1.")] = 5000,
) -> None:
    """Start Prefect and MLflow servers, pools, deployments and workers; what runs is left alone."""
    settle_environment()
    from tclora.jobs.devices import parallel_jobs
    from tclora_cli import machine
    from tclora_cli.services import Machine

    made = Machine(
        folder=folder.expanduser().absolute(),
        root=(root or Path.cwd()).expanduser().absolute(),
        jobs=jobs or parallel_jobs("auto"),
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
    )
    machine.up(made, _say)
    _say(f"{'Prefect':<20}{made.prefect}")
    _say(f"{'MLflow':<20}{made.mlflow}")
    _say(f"{'to use them':<20}export PREFECT_API_URL={made.prefect}/api")
    _say(f"{'':<20}export MLFLOW_TRACKING_URI={made.mlflow}")
    _say(f"{'a first run':<20}prefect deployment run tc-lora/demo --watch")


def down(folder: FolderOption = FOLDER) -> None:
    """Stop what `tclora up` has started, and nothing else; state stays for the next time."""
    from tclora_cli import machine

    machine.down(_known(folder), _say)


def status(folder: FolderOption = FOLDER) -> None:
    """Show whether what `tclora up` has started is healthy; end with code 1 if it is not."""
    from tclora_cli import machine

    found = machine.status(_known(folder))
    for name, (state, place) in found.items():
        _say(f"{name:<20}{state:<12}{place}")
    if any(state != "healthy" for state, _ in found.values()):
        raise typer.Exit(1)


def _known(folder: Path) -> "Machine":
    from tclora.errors import ConfigError
    from tclora_cli.services import Machine

    made = Machine.of(folder.expanduser().absolute())
    if made is None:
        raise ConfigError(f"nothing was started in {folder}; start it with `tclora up`")
    return made


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
