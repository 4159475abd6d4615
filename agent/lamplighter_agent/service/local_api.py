"""The OpenAI-compatible HTTP API on a Unix socket: starlette's routing, uvicorn's HTTP, our queue behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lamplighter_agent.config import LocalApiConfig
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.errors import LamplighterError, RequestError, ServiceError
from lamplighter_agent.service import metrics, unix_socket
from lamplighter_agent.service.admission import Answer, GenerationRequest, RequestQueue, Ticket
from lamplighter_agent.service.messages import TelemetryMessage
from lamplighter_agent.service.openai_format import (
    Answering,
    ChatRequest,
    CompletionRequest,
    JsonObject,
    TokenizeRequest,
    decode_body,
    error_object,
)

logger = logging.getLogger(__name__)

_SENDER: Final = "local"
_BODY_TIMEOUT_S: Final = 15.0
_KEEP_ALIVE_S: Final = 5
_MAX_HEADER_BYTES: Final = 16 * 1024
_STOP_TIMEOUT_S: Final = 5


class Facts(NamedTuple):
    """What the API tells about the agent.

    Attributes:
        sample: Gives the state of now.
        package: Gives the package in use as ``name/version``, or None.
        ready: True when prompts are answered.
    """

    sample: Callable[[], TelemetryMessage]
    package: Callable[[], str | None]
    ready: Callable[[], bool]


class LocalApi:
    """The server.

    Args:
        config: Socket and limits; ``config.socket`` is set.
        requests: Takes prompts.
        facts: What is told about the agent.
    """

    def __init__(self, config: LocalApiConfig, requests: RequestQueue, facts: Facts) -> None:
        self._config = config
        self._requests = requests
        self._facts = facts
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/health", self._health),
            Route("/status", self._status),
            Route("/metrics", self._metrics),
        ]
        application = Starlette(
            routes=routes,
            exception_handlers={
                LamplighterError: _on_error,
                HTTPException: _on_http_error,
                ClientDisconnect: _on_leave,
                Exception: _on_defect,
            },
        )
        self._server = _Server(
            uvicorn.Config(
                application,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                http="h11",
                ws="none",
                limit_concurrency=config.max_connections,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_STOP_TIMEOUT_S,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            )
        )

    def listen(self) -> None:
        """Make the socket; clients may connect and wait from now on.

        Raises:
            ConfigError: If the group is unknown.
            ServiceError: If the socket is in use or cannot be made.
        """
        assert self._config.socket is not None
        self._socket = unix_socket.listen(self._config.socket, mode=int(self._config.mode, 8), group=self._config.group)

    async def start(self) -> None:
        """Answer clients; ``listen`` came before.

        Raises:
            ServiceError: If the server cannot start.
        """
        assert self._socket is not None
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="local-api")
        while not self._server.started:
            if self._task.done():
                raise ServiceError(f"the local API on {self._config.socket} did not start")
            await asyncio.sleep(0.005)
        logger.info("the local API listens on %s", self._config.socket)

    async def stop(self) -> None:
        """Finish what is being answered, within a bound, and remove the socket."""
        if self._socket is None or self._config.socket is None:
            return
        if self._task is not None:
            self._server.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._task, 2 * _STOP_TIMEOUT_S)
        self._socket.close()
        self._config.socket.unlink(missing_ok=True)

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
        return _json(answering.whole(event.text, event.finish_reason, event.usage))

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

    async def _tokenize(self, request: Request) -> Response:
        body = decode_body(await self._read(request), TokenizeRequest)
        worker = self._requests.worker
        if worker is None:
            raise RequestError("no package is ready", code=503, retry_after_s=2.0)
        tokens = await worker.tokenize(body.to_prompt())
        return _json({"tokens": tokens, "count": len(tokens)})

    async def _health(self, _request: Request) -> Response:
        ready = self._facts.ready()
        sample = self._facts.sample()
        state: JsonObject = {
            "status": "ok" if ready else "unavailable",
            "worker": sample.worker,
            "package": sample.package,
        }
        return _json(state, status=200 if ready else 503)

    async def _status(self, _request: Request) -> Response:
        return _json(self._facts.sample())

    async def _metrics(self, _request: Request) -> Response:
        return Response(metrics.prometheus_text(self._facts.sample()), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._config.max_body_bytes:
                        raise RequestError(
                            f"the body has more than {self._config.max_body_bytes} bytes", code=413, hint="shorten it"
                        )
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s", code=408) from error
        return bytes(body)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the agent has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
        if answering.chat:
            yield _data(answering.first())
        while isinstance(event, TextDelta):
            if event.text:
                yield _data(answering.piece(event.text))
            event = await anext(ticket)
        if event.tail:
            yield _data(answering.piece(event.tail))
        yield _data(answering.last(event.finish_reason))
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
    if isinstance(error, RequestError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return _json(body, status=status, headers=headers)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body: JsonObject = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return _json({"error": body}, status=error.status_code, headers=dict(error.headers or {}))


async def _on_leave(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_defect(_request: Request, error: Exception) -> Response:
    """Answer a defect: the client learns that it was not its fault, the log learns the rest."""
    logger.error("a request to the local API failed", exc_info=error)
    body: JsonObject = {"message": "the agent failed", "type": "server_error", "param": None, "code": "error"}
    return _json({"error": body}, status=500)
