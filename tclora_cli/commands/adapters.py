"""``tclora merge``, ``methods`` and ``inspect``: adapters alone, whoever trained them."""

from pathlib import Path
from typing import Annotated

import typer

from tclora.errors import AdapterError
from tclora_cli.commands.shared import JsonOption, console, settle_environment

AdaptersArgument = Annotated[
    list[str], typer.Argument(help="PEFT LoRA directories or Hugging Face ids.")
]


def merge(
    adapters: AdaptersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="See `tclora methods`.")] = "tc-lora",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result.")] = None,
    weights: Annotated[list[float], typer.Option(help="One per adapter, in order.")] = [],  # noqa: B006
    options: Annotated[
        list[str], typer.Option("--option", metavar="KEY=VALUE", help="The method's own options.")
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option(help="Merge adapters of different base models.")] = False,
    sample: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE",
            help="Sample rows of an adapter, or of all with a column 'adapter', for methods that "
            "use activations; loads the base model.",
        ),
    ] = [],  # noqa: B006
    sample_rows: Annotated[int, typer.Option(min=1, help="Rows per adapter.")] = 16,
    scales: Annotated[
        list[float],
        typer.Option(help="Grid of the method's scale, chosen on --sample; repeat the option."),
    ] = [],  # noqa: B006
    base: Annotated[
        str | None, typer.Option(help="Base model for --sample; else the adapters' own.")
    ] = None,
    template: Annotated[str, typer.Option(help="Of --sample: chat or plain.")] = "chat",
    seed: Annotated[int, typer.Option(help="Seed of anything random.")] = 0,
) -> None:
    """Merge PEFT LoRA adapters, whoever trained them; without --sample no model is loaded."""
    if scales and not sample:
        raise AdapterError("--scales needs --sample, rows to choose the scale on")
    settle_environment()
    from tclora_cli.merging import merge_directories
    from tclora_cli.sampling import SampleSource

    merge_directories(
        adapters,
        output,
        method,
        sample=SampleSource(sample, base, template, sample_rows, scales) if sample else None,
        console=console,
        options=options,
        rank=rank,
        weights=weights or None,
        force=force,
        seed=seed,
    )


def methods(as_json: JsonOption = False) -> None:
    """List the merge methods: what they do, where they come from, what they need."""
    from tclora_cli.inspection import method_rows, methods_table

    if as_json:
        console.print_json(data=method_rows())
    else:
        console.print(methods_table())


def inspect(
    adapters: AdaptersArgument,
    picture: Annotated[Path | None, typer.Option(help="Draw the measures (PNG, SVG).")] = None,
) -> None:
    """Show ranks, targets and norms of adapters, and how much they interfere."""
    from tclora_cli.inspection import print_inspection

    print_inspection(adapters, picture, console)
