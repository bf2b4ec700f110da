"""The command line: run the pipeline, look at results, see what a machine has."""

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="tclora",
    help="Cluster-specialised LoRA libraries, jointly factorised and merged (TC-LoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

ConfigArgument = Annotated[
    Path | None, typer.Argument(help="YAML file; the defaults where left out.", show_default=False)
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.epochs=1.")
]


@app.command()
def run(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "report",
) -> None:
    """Run the pipeline here; stages that are already done are taken from the cache."""
    from tclora.config import load_config

    values = load_config(config, overrides)
    _settle_environment()
    from prefect.client.orchestration import get_client

    # Without a server of the user's own, the first client starts one; it needs as long as the
    # imports below.
    server = threading.Thread(target=get_client, kwargs={"sync_client": True})
    server.start()
    from flows.pipeline import pipeline
    from tclora_cli.results import print_results

    server.join()
    outcome = pipeline(values.model_dump(mode="json"), until=until)
    print_results(outcome, console)


@app.command()
def report(
    library: Annotated[Path, typer.Argument(help="Library directory of a finished run.")],
) -> None:
    """Write report.html of a library again."""
    from tclora.report import write_report

    console.print(f"report: {write_report(library)}", highlight=False, soft_wrap=True)


@app.command()
def ui(
    output: Annotated[Path, typer.Option(help="The output folder of the runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on loopback with the store of the runs."""
    from tasks.tracking import tracking_uri

    uri = tracking_uri(output)
    if uri.startswith("http"):
        console.print(f"MLflow runs at {uri} (MLFLOW_TRACKING_URI)", highlight=False)
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise typer.BadParameter(
            f"{output} holds no MLflow store yet; run the pipeline first or name its --output"
        )
    console.print(f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)", highlight=False)
    command = [
        "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    os.execvp(sys.executable, [sys.executable, "-m", *command])  # noqa: S606


@app.command("config")
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


@app.command()
def doctor(
    config: ConfigArgument = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Show what is installed, which devices there are, where caches lie, what would be fetched."""
    from tclora.config import load_config
    from tclora_cli.doctor import print_diagnosis

    _settle_environment()
    healthy = print_diagnosis(load_config(config, overrides), console)
    raise typer.Exit(0 if healthy else 1)


AdaptersArgument = Annotated[
    list[str], typer.Argument(help="PEFT LoRA directories or Hugging Face ids.")
]


@app.command("merge")
def merge_adapters(
    adapters: AdaptersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="See `tclora methods`.")] = "tc-lora",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result.")] = None,
    weights: Annotated[list[float], typer.Option(help="One per adapter, in order.")] = [],  # noqa: B006
    options: Annotated[
        list[str], typer.Option("--option", metavar="KEY=VALUE", help="The method's own options.")
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option(help="Merge adapters of different base models.")] = False,
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE",
            help="Sample rows of an adapter, or of all with a column 'adapter', for methods that "
            "use activations; loads the base model.",
        ),
    ] = [],  # noqa: B006
    calibration_rows: Annotated[int, typer.Option(min=1, help="Rows per adapter.")] = 16,
    scales: Annotated[
        list[float],
        typer.Option(
            help="Grid of the method's scale, chosen on --calibration; repeat the option."
        ),
    ] = [],  # noqa: B006
    base: Annotated[
        str | None, typer.Option(help="Base model for --calibration; else the adapters' own.")
    ] = None,
    template: Annotated[str, typer.Option(help="Of --calibration: chat or plain.")] = "chat",
    seed: Annotated[int, typer.Option(help="Seed of anything random.")] = 0,
) -> None:
    """Merge PEFT LoRA adapters, whoever trained them; without --calibration no model is loaded."""
    _settle_environment()
    from tclora_cli.merging import Calibration, merge_directories

    if scales and not calibration:
        raise typer.BadParameter("--scales needs --calibration, rows to choose the scale on")
    merge_directories(
        adapters,
        output,
        method,
        calibration=Calibration(calibration, base, template, calibration_rows, scales)
        if calibration
        else None,
        console=console,
        options=options,
        rank=rank,
        weights=weights or None,
        force=force,
        seed=seed,
    )


@app.command("methods")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the merge methods: what they do, where they come from, what they need."""
    from tclora_cli.merging import method_rows, methods_table

    if as_json:
        console.print_json(data=method_rows())
    else:
        console.print(methods_table())


@app.command()
def inspect(
    adapters: AdaptersArgument,
    picture: Annotated[Path | None, typer.Option(help="Draw the measures (PNG, SVG).")] = None,
) -> None:
    """Show ranks, targets and norms of adapters, and how much they interfere."""
    from tclora_cli.merging import print_inspection

    print_inspection(adapters, picture, console)


LibraryArgument = Annotated[
    Path, typer.Argument(help="Library directory of a run, or its folder routed/.")
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


@app.command()
def generate(
    library: LibraryArgument,
    prompts: Annotated[list[str], typer.Argument(help="Answered in one batch.")],
    base: BaseOption = None,
    embedder: EmbedderOption = None,
    router: RouterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer (tokens).")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Answer prompts by a routed library and show where each was routed."""
    _settle_environment()
    from tclora_cli.serving import print_answers

    print_answers(library, prompts, (base, embedder, router), max_new_tokens, as_json, console)


@app.command()
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
    _settle_environment()
    from tclora_cli.serving import serve_library

    serve_library(library, (base, embedder, router), host, port, max_batch, max_tokens, console)


@app.command()
def export(
    library: LibraryArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    cluster: Annotated[str | None, typer.Option(help="Adapter name or number.")] = None,
    weights: Annotated[
        list[str], typer.Option("--weight", metavar="NAME=WEIGHT", help="A mixture instead.")
    ] = [],  # noqa: B006
) -> None:
    """Write one cluster of a routed library, or a mixture, as a plain PEFT adapter."""
    from tclora_cli.serving import export_adapter

    place = export_adapter(library, output, cluster, weights)
    console.print(f"adapter: {place}", highlight=False, soft_wrap=True)


def _settle_environment() -> None:
    """Defaults of the libraries for a local run; what the user has set wins."""
    for name, value in {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Run the command line; errors the user can repair end with one message, not a traceback."""
    from tclora.errors import TcloraError
    from tclora.registry import load_plugins

    try:
        load_plugins()
        app()
    except TcloraError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}; what was finished is kept", highlight=False
        )
        sys.exit(2)
