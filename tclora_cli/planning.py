"""``tclora run --plan``: what a run would cost, as a table."""

from rich.console import Console
from rich.table import Table

from tclora.preflight.plan import Plan
from tclora.report.notation import duration, number, size
from tclora_cli.tables import print_whole


def print_plan(plan: Plan, console: Console) -> None:
    """Print what would be fetched, the cost of every stage, and what it rests on."""
    places = plan.fetched or ("nothing: models and data are on this machine",)
    for place in places:
        console.print(f"fetched  {place}", highlight=False, soft_wrap=True, markup=False)
    table = Table("stage", title="Plan", title_justify="left")
    for column in ("jobs", "rows", "tokens", "steps", "time", "memory of a job"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        counts = (stage.jobs, stage.rows, stage.tokens, stage.steps)
        table.add_row(stage.name, *map(number, counts), duration(stage.seconds), size(stage.memory))
    total = sum(stage.seconds for stage in plan.stages)
    table.add_row("all", "", "", "", "", duration(total), size(max(s.memory for s in plan.stages)))
    print_whole(table, console)
    if plan.training:
        print_whole(_jobs(plan), console)
    for line in plan.assumptions:
        console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)


def _jobs(plan: Plan) -> Table:
    table = Table("training job", title="Training", title_justify="left")
    for column in ("rows", "tokens", "steps", "time alone", "memory", "device"):
        table.add_column(column, justify="right")
    for job in plan.training:
        counts = map(number, (job.rows, job.tokens, job.steps))
        table.add_row(
            _shown(job.names), *counts, duration(job.seconds), size(job.memory), plan.device
        )
    return table


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, … {names[-1]} ({len(names)})"
