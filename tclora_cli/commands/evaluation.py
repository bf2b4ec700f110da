"""``tclora eval`` and ``compare``: measuring on tasks, and two results item by item."""

from pathlib import Path
from typing import Annotated

import typer

from tclora_cli.commands.shared import console, settle_environment


def evaluate(
    target: Annotated[
        str, typer.Argument(help="Library directory, LoRA adapter or base model.", metavar="TARGET")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|NAME",
            help="JSONL, Parquet or CSV file, folder of them, or a task of lm-eval; repeat it.",
        ),
    ],
    methods: Annotated[
        list[str], typer.Option(help="Of a library: base, own, joint, routed, oracle or a merge.")
    ] = [],  # noqa: B006
    adapters: Annotated[
        list[str],
        typer.Option("--adapter", metavar="NAME=DIR", help="Another adapter to measure beside."),
    ] = [],  # noqa: B006
    limits: Annotated[
        list[str],
        typer.Option("--limit", metavar="[TASK=]N", help="First rows of each, or a, task only."),
    ] = [],  # noqa: B006
    few_shot: Annotated[
        int, typer.Option(min=0, help="Rows of its task shown before each prompt.")
    ] = 0,
    shots: Annotated[
        list[str], typer.Option(metavar="FILE", help="Where to take them; else rows of split train")
    ] = [],  # noqa: B006
    scorers: Annotated[
        list[str], typer.Option("--scorer", metavar="TASK=NAME", help="Scorer of a task's rows.")
    ] = [],  # noqa: B006
    generate: Annotated[bool, typer.Option(help="Score generated answers.")] = True,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer (tokens).", show_default="128")
    ] = None,
    token_budget: Annotated[
        int, typer.Option(min=1, help="Padded tokens per forward pass; less is faster on a CPU.")
    ] = 2048,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let scorers and tasks run generated code.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model, if it is not where the target says.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="chat or plain, of the prompts.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base model's weights, such as float32.")
    ] = None,
    track: Annotated[bool, typer.Option("--track", help="Log to MLflow as well.")] = False,
    seed: Annotated[int, typer.Option(help="Of rows shown from files, and intervals.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of results.", show_default="runs/eval/TARGET's name"
        ),
    ] = None,
) -> None:
    """Measure a library's methods, an adapter or a model on tasks; finished results are kept."""
    settle_environment()
    from tclora_cli.evaluating import EvaluationRequest, run_evaluation

    run_evaluation(
        EvaluationRequest(
            target=target,
            tasks=tasks,
            methods=methods,
            adapters=adapters,
            limits=limits,
            few_shot=few_shot,
            shown_from=shots,
            scorers=scorers,
            generate=generate,
            max_new_tokens=max_new_tokens,
            token_budget=token_budget,
            allow_code=allow_code,
            base=base,
            template=template,
            dtype=dtype,
            track=track,
            seed=seed,
            output=output or Path("runs") / "eval" / Path(target).name,
        ),
        console,
    )


def compare(
    first: Annotated[str, typer.Argument(help="FOLDER:METHOD of an evaluation or a library.")],
    second: Annotated[str, typer.Argument(help="The one it is compared with.")],
    tasks: Annotated[list[str], typer.Option(help="Of these tasks only.")] = [],  # noqa: B006
    metric: Annotated[
        str, typer.Option(help="correct, correct_norm or nll (per response token).")
    ] = "correct",
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Pair two results item by item: difference with its interval, wins, losses and ties."""
    from tclora_cli.comparing import print_comparison

    print_comparison((first, second), tasks, metric, confidence, seed, console)
