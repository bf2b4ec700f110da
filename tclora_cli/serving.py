"""The command line's use of a routed library: answer prompts, serve them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tclora.errors import LibraryError
from tclora.library.published import library_folder
from tclora.route.model import Completion, RoutedModel, load

if TYPE_CHECKING:
    from tclora.serve import Served

Parts = tuple[str | None, str | None, str | None]  # base, embedder, router, each if not its own


def _load(library: str | Path, parts: Parts) -> RoutedModel:
    base, embedder, router = parts
    try:
        return load(library, base, embedder=embedder, router=router)
    except ValueError as error:  # an unknown router
        raise LibraryError(str(error)) from error


def print_answers(
    library: str,
    prompts: Sequence[str],
    parts: Parts,
    max_new_tokens: int,
    as_json: bool,
    console: Console,
) -> None:
    """Answer prompts and print each answer with its routing weights."""
    if empty := [i for i, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise LibraryError(f"prompts must not be empty, but number {empty[0]} is")
    model = _load(library, parts)
    answers = model.generate(prompts, max_new_tokens=max_new_tokens)
    if as_json:
        rows = [
            {"prompt": prompt, "text": answer.text, "known": answer.known}
            | {"belonging": answer.belonging}
            | {"weights": answer.weights, "by_token": answer.by_token}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        console.print_json(data=rows)
        return
    table = Table("prompt", "answer", "route")
    for prompt, answer in zip(prompts, answers, strict=True):
        table.add_row(prompt, answer.text, _route(answer))
    console.print(table, markup=False)


def _route(answer: Completion) -> str:
    rest = 1 - answer.belonging
    if answer.by_token:
        named = {"every token by itself": answer.belonging}
    else:
        named = {name: weight * answer.belonging for name, weight in answer.weights.items()}
    ranked = sorted((named | {"fallback": rest}).items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)


def serve_library(
    library: str,
    parts: Parts,
    host: str,
    port: int,
    max_batch: int,
    max_tokens: int,
    console: Console,
) -> None:
    """Serve a routed library until interrupted."""
    import uvicorn

    from tclora.serve import Engine, Limits, create_app

    folder = library_folder(library)
    engine, name = Engine(_load(folder, parts), max_batch), folder.absolute().name
    limits = Limits(max_tokens=max_tokens, default_tokens=min(256, max_tokens))
    console.print(
        f"{name}: http://{host}:{port}/v1 (Ctrl-C ends it)", highlight=False, soft_wrap=True
    )
    app = create_app(engine, name, limits, _traces(name))
    uvicorn.run(app, host=host, port=port, log_level="warning")
    engine.close()


def _traces(experiment: str) -> "Callable[[Served], None] | None":
    """Return what logs every answer as a trace, where the user has named an MLflow store."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    # They are logged in a thread beside the requests already; a queue would be lost at the end.
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    from tasks.traces import log_served, trace_into

    trace_into(experiment)
    return log_served
