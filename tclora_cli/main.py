"""The command ``tclora``: its commands by group, and how errors end."""

import sys
from collections.abc import Callable

import typer

from tclora.errors import TcloraError
from tclora.registry import load_plugins
from tclora_cli.commands import (
    adapters,
    configuration,
    evaluation,
    garbage,
    libraries,
    machine,
    pipeline,
    routed,
    studies,
)
from tclora_cli.commands.former import FormerOptions

app = typer.Typer(
    name="tclora",
    help="Cluster-specialised LoRA libraries, jointly factorised and merged (TC-LoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": pipeline.run,
    "study": studies.study,
    "config": configuration.show_config,
    "doctor": configuration.doctor,
    "report": libraries.report,
    "verify": libraries.verify,
    "ui": libraries.ui,
    "merge": adapters.merge,
    "methods": adapters.methods,
    "inspect": adapters.inspect,
    "generate": routed.generate,
    "serve": routed.serve,
    "export": routed.export,
    "eval": evaluation.evaluate,
    "compare": evaluation.compare,
    "gc": garbage.gc,
    "up": machine.up,
    "down": machine.down,
    "status": machine.status,
}
for name, command in _COMMANDS.items():
    app.command(name, cls=FormerOptions)(command)


def main() -> None:
    """Run the command line; errors the user can repair end with one message, not a traceback."""
    try:
        load_plugins()
        app()
    except TcloraError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{error}; what was finished is kept")


def _fail(message: str) -> None:
    """Print plain text, which no terminal's width breaks, and end with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
