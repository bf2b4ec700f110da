"""``tclora generate``, ``serve`` and ``export``: a routed library at work."""

from pathlib import Path
from typing import Annotated

import typer

from tclora_cli.commands.shared import JsonOption, console, settle_environment

LibraryArgument = Annotated[
    str,
    typer.Argument(help="Library directory, its folder routed/, or URL/NAME of a published one."),
]
BaseOption = Annotated[
    str | None, typer.Option(help="Base model, if it is not where the library was made.")
]
EmbedderOption = Annotated[
    str | None, typer.Option(help="Embedding model, if it is not where the library was made.")
]

RouterOption = Annotated[
    str | None,
    typer.Option(help="Another router on the library's clusters, such as softmax or per-token."),
]


def generate(
    library: LibraryArgument,
    prompts: Annotated[list[str], typer.Argument(help="Answered in one batch.")],
    base: BaseOption = None,
    embedder: EmbedderOption = None,
    router: RouterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer (tokens).")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts by a routed library and show where each was routed."""
    settle_environment()
    from tclora_cli.serving import print_answers

    print_answers(library, prompts, (base, embedder, router), max_new_tokens, as_json, console)


def serve(
    library: LibraryArgument,
    base: BaseOption = None,
    embedder: EmbedderOption = None,
    router: RouterOption = None,
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    host: Annotated[str, typer.Option(help="Address; anyone who reaches it may use it.")] = (
        "127.0.0.1"
    ),
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer (tokens).")] = 1024,
) -> None:
    """Serve a routed library as an OpenAI-compatible endpoint, /v1/chat/completions."""
    settle_environment()
    from tclora_cli.serving import serve_library

    serve_library(library, (base, embedder, router), host, port, max_batch, max_tokens, console)


def export(
    library: LibraryArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    cluster: Annotated[str | None, typer.Option(help="Adapter name or number.")] = None,
    weights: Annotated[
        list[str], typer.Option("--weight", metavar="NAME=WEIGHT", help="A mixture instead.")
    ] = [],  # noqa: B006
    static_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The static merge instead, moved so far towards the fallback gate."
        ),
    ] = None,
) -> None:
    """Write one cluster of a routed library, a mixture or a static merge as a plain adapter."""
    from tclora_cli.export import export_adapter

    place = export_adapter(library, output, cluster, weights, static_share)
    console.print(f"adapter: {place}", highlight=False, soft_wrap=True)
