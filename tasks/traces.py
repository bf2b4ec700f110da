"""MLflow traces of a routed model's answers: how a prompt was routed, and what was generated.

Nothing is traced, and no store is made, where the user has named none (``MLFLOW_TRACKING_URI`` or
``mlflow.set_tracking_uri``), unless a trace is under way already, as in ``mlflow.genai.evaluate``.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import SpanStatusCode, SpanType
from mlflow.entities.span import NoOpSpan
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracking import is_tracking_uri_set

if TYPE_CHECKING:  # MLflow reads the model's file, and so this one, before it loads the model
    from tclora.route.model import Completion, RoutedModel
    from tclora.serve.answer import Served

_SQLITE = "sqlite:///"
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")  # of OpenAI
_MLFLOW_USAGE = ("input_tokens", "output_tokens", "total_tokens")


def answer(
    model: "RoutedModel", prompts: Sequence[str], max_new_tokens: int, batch: int
) -> "list[Completion]":
    """Answer prompts, so many together, in one trace with spans ``route`` and ``generate``."""
    answers: list[Completion] = []
    with _span("answer", SpanType.CHAIN) as root:
        root.set_inputs({"prompts": list(prompts), "max_new_tokens": max_new_tokens})
        for start in range(0, len(prompts), batch):
            answers += _answer_batch(model, prompts[start : start + batch], max_new_tokens)
        root.set_outputs([answer.text for answer in answers])
    return answers


def _answer_batch(
    model: "RoutedModel", prompts: Sequence[str], max_new_tokens: int
) -> "list[Completion]":
    with _span("route", SpanType.TASK) as span:
        span.set_inputs({"prompts": list(prompts)})
        routing = model.route(prompts)
        span.set_outputs([model.decision(routing, row) for row in range(len(prompts))])
    with _span("generate", SpanType.LLM) as span:
        span.set_inputs({"prompts": list(prompts), "max_new_tokens": max_new_tokens})
        answers = model.generate(prompts, max_new_tokens=max_new_tokens, routing=routing)
        span.set_outputs([answer.text for answer in answers])
    return answers


def _span(name: str, kind: str) -> AbstractContextManager[Any]:
    named: bool = is_tracking_uri_set()  # type: ignore[no-untyped-call]
    if named or mlflow.get_current_active_span() is not None:
        return mlflow.start_span(name, kind)
    return nullcontext(NoOpSpan())  # type: ignore[no-untyped-call]


def trace_into(experiment: str) -> None:
    """Let traces go to an experiment of the store; the user's ``MLFLOW_EXPERIMENT_...`` win.

    One that is new keeps its files beside a local store, as those of runs do.
    """
    if {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
        return
    store = mlflow.get_tracking_uri()
    if store.startswith(_SQLITE) and mlflow.get_experiment_by_name(experiment) is None:
        files = Path(store.removeprefix(_SQLITE)).absolute().with_name("mlartifacts")
        mlflow.create_experiment(experiment, artifact_location=files.as_uri())
    mlflow.set_experiment(experiment)


def log_served(served: "Served") -> None:
    """Log one answer of ``tclora serve`` as a trace, with its own times."""
    inputs = {"messages": served.messages, **served.options}
    root = mlflow.start_span_no_context(
        "chat", SpanType.CHAIN, inputs=inputs, start_time_ns=served.began
    )
    route = mlflow.start_span_no_context(
        "route",
        SpanType.TASK,
        parent_span=root,
        inputs={"prompt": served.prompt},
        start_time_ns=served.began,
    )
    route.end(outputs=served.route, end_time_ns=served.routed)
    generate = mlflow.start_span_no_context(
        "generate",
        SpanType.CHAT_MODEL,
        parent_span=root,
        inputs=inputs,
        start_time_ns=served.routed,
    )
    usage = dict(zip(_MLFLOW_USAGE, (served.usage[name] for name in _USAGE), strict=True))
    generate.set_attribute(SpanAttributeKey.CHAT_USAGE, usage)
    outputs: Any = {"text": served.text, "finish_reason": served.finish}
    status = SpanStatusCode.ERROR if served.error else SpanStatusCode.OK
    for span in (generate, root):
        if served.error:
            span.set_attribute("error", served.error)
        span.end(outputs=outputs, status=status, end_time_ns=served.ended)
