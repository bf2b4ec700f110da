"""``tclora config`` and ``tclora doctor``: what a run would do, and whether it can run here."""

from typing import Annotated

import typer
import yaml

from tclora_cli.commands.shared import ConfigArgument, SetOption, console, settle_environment


def show_config(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
    schema: Annotated[bool, typer.Option(help="Print the reference of all keys instead.")] = False,
) -> None:
    """Print the resolved configuration as YAML, or every key with type and meaning."""
    from tclora.config import Config, load_config

    if schema:
        console.print_json(data=Config.model_json_schema())
        return
    values = load_config(config, overrides).model_dump(mode="json")
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def doctor(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Show what is installed, which devices there are, where caches lie, what would be fetched."""
    from tclora.config import load_config

    values = load_config(config, overrides)
    settle_environment()
    from tclora_cli.doctor import print_diagnosis

    raise typer.Exit(0 if print_diagnosis(values, console) else 1)
