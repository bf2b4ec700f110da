"""``tclora study``: the pipeline over a grid of settings."""

from typing import Annotated

import typer

from tclora_cli.commands.shared import ConfigArgument, SetOption, console, settle_environment


def study(
    name: Annotated[str, typer.Argument(help="Which study; a wrong name lists them.")],
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
    axes: Annotated[
        list[str],
        typer.Option(
            "--axis", metavar="KEY=[VALUE, ...]", help="Values in place of, or beside, its own."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Run a grid of settings; end in a table, a plot and a summary. Finished stages are kept."""
    from tclora.config import load_config
    from tclora.errors import ConfigError
    from tclora.study.cells import parse_axis
    from tclora.study.registry import studies

    if name not in studies:
        raise ConfigError(studies.unknown(name))
    values, given = load_config(config, overrides), dict(map(parse_axis, axes))
    settle_environment()
    from tclora.imports import lasting
    from tclora_cli.server import TemporaryServer

    server = TemporaryServer()
    server.start()
    with lasting():
        from flows.study import study as run

    with server.ready():
        places = run(name, values, given)
    for label, place in places.items():
        console.print(f"{label:<15} {place}", highlight=False, soft_wrap=True, markup=False)
