"""What several commands share: the console, the arguments they have in common, the environment."""

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

ConfigArgument = Annotated[
    Path | None, typer.Argument(help="YAML file; the defaults where left out.", show_default=False)
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.epochs=1.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def settle_environment() -> None:
    """Set the libraries' defaults for a local run, before they are imported; the user's win."""
    for name, value in {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)
    # PEFT 0.21 asks transformers 5.23 by a name that is on its way out; nobody here can help it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
