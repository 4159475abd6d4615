"""What every HTTP request passes before its route: the limit on connections, the token of TCP clients, the log line."""

from __future__ import annotations

import hmac
import logging
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lamplighter_agent.service.local_api_protocol import ADMITTED, TCP_CLIENT

logger = logging.getLogger(__name__)

_OPEN_PATHS: Final = frozenset({"/", "/health"})
_RETRY_AFTER_S: Final = "2"
MAX_HEADER_BYTES: Final = 16 * 1024


class Gate:
    """Wraps the application.

    Args:
        application: What answers those who get in.
        token: What TCP clients must show, or None where there is no TCP.
    """

    def __init__(self, application: ASGIApp, token: str | None) -> None:
        self._application = application
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in or answer it here."""
        answer = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (answer or self._application)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        client = request.client
        assert client is not None
        if request.method == "POST":
            # The path as it was sent: decoded it may hold what a terminal acts on.
            path = request.scope["raw_path"][:100].decode("ascii", "replace")
            logger.info("POST %s by %s, pid %d", path, client.host, client.port)
        if refusal := _bad_header(request):
            return refusal
        if not request.scope["state"][ADMITTED]:
            return _refused(503, "too many requests are under way", "server_error", {"Retry-After": _RETRY_AFTER_S})
        if client.host == TCP_CLIENT and request.url.path not in _OPEN_PATHS and not self._shows_token(request):
            return _refused(401, "a wrong or missing token", "authentication_error", {"WWW-Authenticate": "Bearer"})
        return None

    def _shows_token(self, request: Request) -> bool:
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        expected = self._token or ""
        return kind.lower() == "bearer" and bool(expected) and hmac.compare_digest(shown.encode(), expected.encode())


def _bad_header(request: Request) -> Response | None:
    """Refuse what the protocol lets through: a large header in one piece, a body of two lengths, a compressed one."""
    if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEADER_BYTES:
        return _refused(431, f"the header has more than {MAX_HEADER_BYTES} bytes", "invalid_request_error", {})
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        return _refused(400, "give Content-Length or Transfer-Encoding, not both", "invalid_request_error", {})
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        return _refused(415, f"the content encoding {coding[:40]!r} is not known", "invalid_request_error", {})
    return None


def _refused(status: int, message: str, kind: str, headers: dict[str, str]) -> Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": "request"}}
    headers = {**headers, "Connection": "close"}
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
