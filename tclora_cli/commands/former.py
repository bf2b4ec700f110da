"""Options that have another name now: for one version the former one is taken with a notice."""

from typing import Any

import typer
from typer.core import TyperCommand

# Options of version 0.1.0; they go with the next version, and this module with them.
RENAMED = {"--calibration": "--sample", "--calibration-rows": "--sample-rows"}


class FormerOptions(TyperCommand):
    """A command that takes the former names of its options and does not show them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, typer has a Context of its own
        """Parse the arguments with today's names of options."""
        own = {name for parameter in self.params for name in parameter.opts}
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [_present(a, own) for a in args[:end]] + args[end:])


def _present(argument: str, own: set[str]) -> str:
    former, sign, value = argument.partition("=")
    present = RENAMED.get(former)
    if present not in own:
        return argument
    typer.echo(f"{former} is now {present}; the former name goes with the next version", err=True)
    return f"{present}{sign}{value}"
