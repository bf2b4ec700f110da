"""The endpoint: ``/v1/chat/completions`` and ``/v1/models`` as OpenAI's clients expect them.

Every answer also says where it was routed (``tclora``: known, belonging, weights).
"""

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field

from tclora.route.model import RoutedModel
from tclora.route.routing import Routing
from tclora.serve.answer import Answer, Served
from tclora.serve.engine import Engine
from tclora.serve.request import Piece
from tclora.serve.request import Request as Generation

_MAX_BODY = 1 << 20  # bytes
_LOOK = 0.5  # how often it is looked whether a client has left (s)
_COLDEST = 1e-3  # lower temperatures decode greedily


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes
    ----------
    max_tokens : int
        Longest answer (tokens).
    default_tokens : int
        Length of an answer where the request says none (tokens).
    timeout : float
        A request that has waited and worked for longer is cancelled (s).
    """

    max_tokens: int = 1024
    default_tokens: int = 256
    timeout: float = 300.0


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """What ``/v1/chat/completions`` takes; what it cannot honour is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    n: Literal[1] = 1
    user: str | None = None


def create_app(
    engine: Engine,
    name: str,
    limits: Limits | None = None,
    on_end: Callable[[Served], None] | None = None,
) -> FastAPI:
    """Make the application.

    Parameters
    ----------
    engine : Engine
        Answers the requests.
    name : str
        Name of the model.
    limits : Limits, optional
        What a request may ask for.
    on_end : callable, optional
        Called, beside other requests, with every one that was answered, cancelled or has failed.

    Returns
    -------
    FastAPI
    """
    limits = limits or Limits()
    app = FastAPI(title=f"tclora: {name}", docs_url=None, redoc_url=None)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)

    @app.middleware("http")
    async def limit_body(request: Request, proceed: Any) -> Any:  # noqa: ANN401
        length = request.headers.get("content-length", "")
        if request.method == "POST" and (not length.isdigit() or int(length) > _MAX_BODY):
            return _error(413, f"the body must have a Content-Length of at most {_MAX_BODY} bytes")
        return await proceed(request)

    @app.get("/health")
    def health() -> JSONResponse:
        status = "ok" if engine.alive else "the engine has ended"
        body = {"status": status, "model": name, "waiting": engine.waiting}
        return JSONResponse(body, 200 if engine.alive else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "tclora"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        if asked.model not in {None, name}:
            raise HTTPException(404, f"model must be {name!r}, got {asked.model!r}")
        answer = Answer(name, on_end)
        routing = await asyncio.to_thread(_route, engine.model, asked)
        generation = _generation(engine.model, asked, routing, answer, limits)
        route = {**engine.model.decision(routing, 0), "by_token": routing.by_token is not None}
        answer.served = served = _served(asked, generation, route, answer.began)
        try:
            engine.submit(generation)
        except queue.Full:
            raise HTTPException(429, "too many requests wait; try again later") from None
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from None
        if asked.stream:
            events = _stream(answer, generation, route, limits)
            return StreamingResponse(events, media_type="text/event-stream")
        whole = asyncio.ensure_future(_whole(answer, served, generation, limits))
        return JSONResponse(await _unless_gone(request, whole))

    return app


def _route(model: RoutedModel, asked: ChatRequest) -> Routing:
    return model.route([_prompt(asked)])


def _prompt(asked: ChatRequest) -> str:
    """Return the last user's turn, by which is routed: the clusters were made of such texts."""
    turns = [message.content for message in asked.messages if message.role == "user"]
    if not turns:
        raise HTTPException(400, "messages must have at least one of role 'user'")
    return turns[-1]


def _generation(
    model: RoutedModel, asked: ChatRequest, routing: Routing, answer: Answer, limits: Limits
) -> Generation:
    tokens = _tokens(model, asked.messages)
    wanted = asked.max_completion_tokens or asked.max_tokens or limits.default_tokens
    if wanted > limits.max_tokens:
        raise HTTPException(400, f"max_tokens must be at most {limits.max_tokens}, got {wanted}")
    room = model.max_tokens - len(tokens)
    if room < 1:
        raise HTTPException(
            400, f"messages must leave room in {model.max_tokens} tokens, got {len(tokens)}"
        )
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Generation(
        tokens=tokens,
        routing=routing,
        on_piece=answer.put,
        max_tokens=min(wanted, room),
        temperature=asked.temperature if asked.temperature >= _COLDEST else 0.0,
        top_p=asked.top_p,
        stop=tuple(text for text in stop if text),
    )


def _tokens(model: RoutedModel, messages: list[Message]) -> tuple[int, ...]:
    """Put a conversation into the library's template."""
    tokenizer = model.tokenizer
    if model.library.info.template == "chat":
        turns = [message.model_dump() for message in messages]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise HTTPException(400, f"messages do not fit the chat template: {error}") from error
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)
    return tuple(tokenizer("".join(f"{message.content}\n" for message in messages)).input_ids)


def _served(
    asked: ChatRequest, generation: Generation, route: dict[str, Any], began: int
) -> Served:
    """Say what is known of a request that is about to be answered."""
    return Served(
        messages=[message.model_dump() for message in asked.messages],
        prompt=_prompt(asked),
        options={
            "max_tokens": generation.max_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "stop": list(generation.stop),
        },
        route=route,
        prompt_tokens=len(generation.tokens),
        began=began,
        routed=time.time_ns(),
    )


async def _pieces(answer: Answer, generation: Generation, limits: Limits) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer; if its client leaves or time runs out, cancel it."""
    deadline = time.monotonic() + limits.timeout
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            piece = await asyncio.wait_for(answer.pieces.get(), left)
            yield piece
            if piece.finish or piece.error:
                return
    finally:
        generation.cancelled.set()


async def _unless_gone(request: Request, whole: "asyncio.Future[dict[str, Any]]") -> dict[str, Any]:
    """Wait for an answer; cancel it if its client leaves."""
    while not whole.done():
        await asyncio.wait({whole}, timeout=_LOOK)
        if not whole.done() and await request.is_disconnected():
            whole.cancel()
            raise HTTPException(499, "the client has left")
    return whole.result()


async def _whole(
    answer: Answer, served: Served, generation: Generation, limits: Limits
) -> dict[str, Any]:
    last = Piece("", 0)
    try:
        async for piece in _pieces(answer, generation, limits):
            last = piece
    except TimeoutError:
        raise HTTPException(504, f"no answer within {limits.timeout:g} s") from None
    if last.error:
        raise HTTPException(500, f"generation failed: {last.error}")
    message = {"role": "assistant", "content": served.text}
    return answer.body("chat.completion", {"message": message, "finish_reason": last.finish}) | {
        "usage": served.usage,
        "tclora": served.route,
    }


async def _stream(
    answer: Answer, generation: Generation, route: dict[str, Any], limits: Limits
) -> AsyncIterator[str]:
    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return answer.body("chat.completion.chunk", {"delta": delta, "finish_reason": finish})

    yield event(chunk({"role": "assistant", "content": ""}) | {"tclora": route})
    try:
        async for piece in _pieces(answer, generation, limits):
            if piece.error:
                yield event(_error_body(f"generation failed: {piece.error}", 500))
                return
            delta = {"content": piece.text} if piece.text else {}
            yield event(chunk(delta, piece.finish))
    except TimeoutError:
        yield event(_error_body(f"no answer within {limits.timeout:g} s", 504))
        return
    yield "data: [DONE]\n\n"


def _error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_body(message, status), status)


def _refused(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}"
        for problem in error.errors()
    ]
    return _error(400, "; ".join(problems))
