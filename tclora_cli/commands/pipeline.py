"""``tclora run``: the pipeline, after everything that files can tell has been checked."""

from typing import Annotated

import typer

from tclora_cli.commands.shared import ConfigArgument, SetOption, console, settle_environment


def run(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage.", show_default="the last")
    ] = None,
) -> None:
    """Run the pipeline here; stages that are already done are taken from the cache."""
    from tclora.config import load_config
    from tclora.preflight.data import check_data

    values = load_config(config, overrides)
    check_data(values)
    settle_environment()
    from tclora_cli.server import TemporaryServer

    server = TemporaryServer()  # imports Prefect while the models are checked
    from tclora.preflight.models import check_models

    models = check_models(values)
    server.start()
    from flows.pipeline import STEPS, checked_pipeline
    from tclora_cli.results import print_results

    server.wait()
    outcome = checked_pipeline(values, models, until or STEPS[-1])
    print_results(outcome, console, finished=outcome["until"] == STEPS[-1])
