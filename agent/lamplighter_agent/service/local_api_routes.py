"""What the local API answers: OpenAI's paths and the agent's own, requests in, JSON or server-sent events out."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service import metrics
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.memory_view import MemoryReport
from lamplighter_agent.service.messages import TelemetryMessage
from lamplighter_agent.service.openai_answer import Answering, embeddings
from lamplighter_agent.service.openai_format import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    JsonObject,
    TokenizeRequest,
    decode_body,
    error_object,
)
from lamplighter_agent.service.ticket import GenerationRequest, Ticket
from lamplighter_agent.service.worker import EngineWorker

logger = logging.getLogger(__name__)

_SENDER: Final = "local"
_BODY_TIMEOUT_S: Final = 15.0
_BODY_LEFT: Final = frozenset({408, 413})
"""Answers that may come before the request's end, which nobody waits for."""
_PATHS: Final = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/tokenize", "/detokenize", "/health",
    "/status", "/metrics",
)  # fmt: skip
_PAGE: Final = Path(__file__).with_name("chat.html")
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}


class Facts(NamedTuple):
    """What the API tells about the agent.

    Attributes:
        sample: Gives the state of now.
        package: Gives the package in use as ``name/version``, or None.
        worker: Gives the state of the engine.
        identifies: True while the chat page shall show that this is the box that somebody looks for.
        ready: True when prompts are answered.
        memory: Gives the engine's memory plan and use, or None.
    """

    sample: Callable[[], Awaitable[TelemetryMessage]]
    package: Callable[[], str | None]
    worker: Callable[[], str]
    ready: Callable[[], bool]
    identifies: Callable[[], bool] = lambda: False
    memory: Callable[[], MemoryReport | None] = lambda: None


class Routes:
    """The paths and what answers them.

    Args:
        requests: Takes prompts.
        facts: What is told about the agent.
        max_body_bytes: Largest request body.
    """

    def __init__(self, requests: RequestQueue, facts: Facts, max_body_bytes: int) -> None:
        self._requests = requests
        self._facts = facts
        self._max_body_bytes = max_body_bytes

    def application(self) -> Starlette:
        """Return the ASGI application; every error leaves it in OpenAI's shape."""
        return Starlette(
            routes=self._routes(),
            exception_handlers={
                LamplighterError: _on_error,
                HTTPException: _on_http_error,
                ClientDisconnect: _on_leave,
                Exception: _on_defect,
            },
        )

    def _routes(self) -> list[Route]:
        return [
            Route("/", self._page),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/health", self._health),
            Route("/status", self._status),
            Route("/metrics", self._metrics),
        ]

    async def _page(self, _request: Request) -> Response:
        return FileResponse(_PAGE, headers=_PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def _chat(self, request: Request) -> Response:
        body = decode_body(await self._read(request), ChatRequest)
        return await self._answer(request, body)

    async def _completion(self, request: Request) -> Response:
        body = decode_body(await self._read(request), CompletionRequest)
        return await self._answer(request, body)

    async def _answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        chat = isinstance(body, ChatRequest)
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        ticket = self._requests.submit(
            GenerationRequest(
                id=answer_id,
                sender=_SENDER,
                client=request.client.host if request.client else None,
                prompt=body.to_prompt(),
                params=body.to_params(),
                model=body.model,
                deadline_s=body.deadline_s,
            )
        )
        assert ticket is not None  # only idempotent requests are known already
        answering = Answering(id=answer_id, model=self._facts.package() or "", chat=chat)
        if body.streams:
            # The first event decides between a stream and an error with its own status.
            first = await _unless_gone(request, ticket)
            events = _sse(ticket, first, answering, include_usage=body.includes_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        event: TextDelta | Answer = await _unless_gone(request, ticket)
        while isinstance(event, TextDelta):
            event = await _unless_gone(request, ticket)
        return _json(answering.whole(event))

    async def _models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [_model_object(name) for name in self._names()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._names():
            raise RequestError(f"this box does not run {name[:100]!r}", code=404, param="model")
        return _json(_model_object(name))

    def _names(self) -> list[str]:
        package = self._facts.package()
        return [] if package is None else [package.partition("/")[0], package]

    async def _embeddings(self, request: Request) -> Response:
        body = decode_body(await self._read(request), EmbeddingRequest)
        answers: list[Answer] = []
        for prompt in body.to_prompts():
            ticket = self._requests.submit(
                GenerationRequest(
                    id=f"embd-{uuid.uuid4().hex}",
                    sender=_SENDER,
                    client=request.client.host if request.client else None,
                    prompt=prompt,
                    params=GenerationParams(),
                    model=body.model,
                    embed=True,
                    is_part=bool(answers),
                )
            )
            assert ticket is not None  # only idempotent requests are known already
            event = await _unless_gone(request, ticket)
            if isinstance(event, TextDelta) or event.embedding is None:
                raise RequestError("the text was not computed in its time", code=408)
            answers.append(event)
        model = self._facts.package() or ""
        return _json(embeddings(answers, model=model, base64=body.encoding_format == "base64"))

    async def _tokenize(self, request: Request) -> Response:
        body = decode_body(await self._read(request), TokenizeRequest)
        self._requests.check_model(body.model)
        tokens = await self._worker().tokenize(body.to_prompt())
        return _json({"tokens": tokens, "count": len(tokens)})

    async def _detokenize(self, request: Request) -> Response:
        body = decode_body(await self._read(request), DetokenizeRequest)
        self._requests.check_model(body.model)
        return _json({"prompt": await self._worker().detokenize(body.tokens)})

    def _worker(self) -> EngineWorker:
        worker = self._requests.worker
        if worker is None:
            raise RequestError("no package is ready", code=503, retry_after_s=2.0)
        return worker

    async def _health(self, _request: Request) -> Response:
        ready = self._facts.ready()
        state: JsonObject = {
            "status": "ok" if ready else "unavailable",
            "worker": self._facts.worker(),
            "package": self._facts.package(),
            "identify": self._facts.identifies(),
            "memory": msgspec.to_builtins(self._facts.memory()),
        }
        return _json(state, status=200 if ready else 503)

    async def _status(self, _request: Request) -> Response:
        return _json(await self._facts.sample())

    async def _metrics(self, _request: Request) -> Response:
        text = metrics.prometheus_text(await self._facts.sample())
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise RequestError(
                            f"the body has more than {self._max_body_bytes} bytes", code=413, hint="shorten it"
                        )
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s", code=408) from error
        return bytes(body)


async def _unless_gone(request: Request, ticket: Ticket) -> TextDelta | Answer:
    """Return the request's next event; cancel it when the client leaves.

    Raises:
        ClientDisconnect: If the client has left.
        LamplighterError: If the request failed.
    """
    event = asyncio.ensure_future(anext(ticket))
    gone = asyncio.ensure_future(request.receive())  # after the body the only message is that the client left
    try:
        await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            raise ClientDisconnect
        return event.result()
    except BaseException:
        ticket.cancel()
        raise
    finally:
        event.cancel()
        gone.cancel()


async def _sse(
    ticket: Ticket, first: TextDelta | Answer, answering: Answering, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield server-sent events; starlette ends the iteration when the client leaves."""
    event: TextDelta | Answer = first
    try:
        for index in range(ticket.request.params.n if answering.chat else 0):
            yield _data(answering.first(index))
        while isinstance(event, TextDelta):
            if event.text or event.logprobs:
                yield _data(answering.piece(event))
            event = await anext(ticket)
        for alternative in event.alternatives:
            if alternative.tail:
                yield _data(answering.tail(alternative))
            yield _data(answering.last(alternative))
        if include_usage:
            yield _data(answering.usage(event.usage))
        yield b"data: [DONE]\n\n"
    except LamplighterError as error:
        yield _data(error_object(error)[1])
    finally:
        ticket.cancel()


def _data(body: JsonObject) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _json(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _model_object(name: str) -> JsonObject:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lamplighter"}


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LamplighterError)
    status, body = error_object(error)
    headers = {}
    if status in _BODY_LEFT:
        headers["Connection"] = "close"
    if isinstance(error, RequestError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return _json(body, status=status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wanted = f"{request.method[:16]} {request.scope['raw_path'][:100].decode('ascii', 'replace')}"
    message = error.detail
    if error.status_code in {404, 405}:
        message = f"{wanted} is not served here: {message}; what is: {', '.join(_PATHS)}"
    body: JsonObject = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return _json({"error": body}, status=error.status_code, headers=dict(error.headers or {}))


async def _on_leave(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_defect(_request: Request, error: Exception) -> Response:
    """Answer a defect: the client learns that it was not its fault, the log learns the rest."""
    logger.error("a request to the local API failed", exc_info=error)
    body: JsonObject = {"message": "the agent failed", "type": "server_error", "param": None, "code": "error"}
    return _json({"error": body}, status=500)
