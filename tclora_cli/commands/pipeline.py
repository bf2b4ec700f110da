"""``tclora run``: the pipeline, after everything that files can tell has been checked."""

from typing import TYPE_CHECKING, Annotated

import typer

from tclora_cli.commands.shared import ConfigArgument, SetOption, console, settle_environment

if TYPE_CHECKING:
    from tclora.config import Config


def run(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage.", show_default="the last")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would fetch and cost; run nothing.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of one job's device, for --plan; else measured here."),
    ] = None,
) -> None:
    """Run the pipeline here; stages that are already done are taken from the cache."""
    from tclora.config import load_config
    from tclora.preflight.data import check_data
    from tclora.preflight.steps import LAST, step_named

    last = step_named(until or LAST)
    values = load_config(config, overrides)
    check_data(values)
    settle_environment()
    if plan:
        _print_plan(values, rate, last)
        return
    from tclora.imports import lasting
    from tclora_cli.server import TemporaryServer

    server = TemporaryServer()  # imports Prefect while the models are checked
    with lasting():
        from tclora.preflight.models import check_models
    models = check_models(values)
    server.start()
    with lasting():
        from flows.pipeline import checked_pipeline
        from tclora_cli.results import print_results

    with server.ready():
        outcome = checked_pipeline(values, models, last)
    print_results(outcome, console, finished=outcome["until"] == LAST)


def _print_plan(config: "Config", rate: float | None, last: str) -> None:
    from tclora.preflight.models import check_models
    from tclora.preflight.plan import make_plan
    from tclora_cli.planning import print_plan

    print_plan(make_plan(config, check_models(config), rate and rate * 1e12, last), console)
