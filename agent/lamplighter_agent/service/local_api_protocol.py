"""uvicorn's HTTP/1.1 with what it lacks on a box: bounds on slow clients, and who is on the other end of the socket.

uvicorn bounds the size of a header and the silence between requests. It does not bound how long a header may take to
arrive nor how long a client may leave an answer unread; either would hold a connection for ever. Nor does it look at
what connections do: hundreds that ask for nothing must not keep out one that asks.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S: Final = 10.0
UNREAD_TIMEOUT_S: Final = 30.0
LATE_S: Final = 1.0
MAX_SILENT: Final = 256
ADMITTED: Final = "admitted"
_PEER: Final = struct.Struct("3i")


TCP_CLIENT: Final = "tcp"


class Peer(NamedTuple):
    """The process that opened a Unix connection, as the kernel tells."""

    pid: int
    user_id: int
    group_id: int


class Crowd:
    """The open connections, oldest first, and who must go where there are too many.

    A connection that has asked for nothing costs little, so that many may be there; one whose request has begun may
    hold a body, so that few may. Both kinds make room for newer ones: the oldest that asks for nothing, and the oldest
    whose body is late, but never one that is being answered.

    Args:
        most: Requests at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._connections: dict[BoundedProtocol, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def join(self, connection: BoundedProtocol) -> None:
        """Count a new connection; if there are too many the oldest one that asks for nothing goes."""
        if len(self._connections) >= self._most + MAX_SILENT:
            self._make_room(each for each in self._connections if not each.is_asking)
        self._connections[connection] = None

    def admit(self, connection: BoundedProtocol) -> bool:
        """Return whether a request that has begun may go on; the oldest one whose body is late makes room."""
        if sum(each.is_asking for each in self._connections) <= self._most:
            return True
        return self._make_room(each for each in self._connections if each.is_late and each is not connection)

    def leave(self, connection: BoundedProtocol) -> None:
        """Count a connection no more."""
        self._connections.pop(connection, None)

    def _make_room(self, candidates: Iterator[BoundedProtocol]) -> bool:
        oldest = next(candidates, None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.make_room()
        return True


class BoundedProtocol(H11Protocol):
    """A connection of the local API.

    Args:
        crowd: The connections of the same API.
        uvicorns: What uvicorn's own class takes.
    """

    header_timeout_s = HEADER_TIMEOUT_S
    unread_timeout_s = UNREAD_TIMEOUT_S
    _answering = False
    _asked_s = 0.0
    _header_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def __init__(self, *, crowd: Crowd, **uvicorns: Any) -> None:  # noqa: ANN401 (as uvicorn has them)
        super().__init__(**uvicorns)
        self._crowd = crowd

    @property
    def is_asking(self) -> bool:
        """True from the end of a request's header to the end of its answer."""
        return self._answering

    @property
    def is_late(self) -> bool:
        """True while the body of a request is awaited for longer than a client needs that means it."""
        return self._answering and self.cycle.more_body and self.loop.time() - self._asked_s > LATE_S

    def make_room(self) -> None:
        """Disconnect a client that keeps this side waiting, for another one."""
        logger.debug("a client (%s, pid %d) that has not sent its request makes room", *(self.client or ("?", -1)))
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base class
        """Note who connects; the first request must come soon."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        assert isinstance(connection, TransportSocket)
        # What the application sees as the client; uvicorn has nothing to put there for a Unix socket.
        if connection.family == socket.AF_UNIX:
            peer = peer_of(connection)
            self.client = (f"uid:{peer.user_id}", peer.pid)
            logger.debug("connection by process %d, user %d, group %d", *peer)
        else:
            self.client = (TCP_CLIENT, 0)
        self._crowd.join(self)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timers."""
        self._crowd.leave(self)
        self._header_arrived()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a header that has begun must end soon."""
        if self._header_timer is None and not self._answering:
            self._await_header()
        super().data_received(data)

    def handle_events(self) -> None:
        """Look at what has come; a request that is under way afterwards has its header."""
        before = self.scope
        super().handle_events()
        if self.scope is not before:
            self._answering = True
            self._asked_s = self.loop.time()
            self._header_arrived()
            self.scope["state"][ADMITTED] = self._crowd.admit(self)  # before the application runs

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP/1.1 in OpenAI's shape, unless an answer has begun."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
            return
        body = msgspec.json.encode(
            {"error": {"message": msg, "type": "invalid_request_error", "param": None, "code": "request"}}
        )
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        """Go on with the next request of the connection, if it has one."""
        self._answering = False
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read: give it a while."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.unread_timeout_s, self._give_up, "left its answer unread")

    def resume_writing(self) -> None:
        """The client reads again."""
        self._was_read()
        super().resume_writing()

    def _should_upgrade(self) -> bool:
        # uvicorn would advise the operator to install a library; a server may answer as if nobody had asked.
        return False

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._give_up, "sent no whole header")

    def _header_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _was_read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up(self, fault: str) -> None:
        logger.warning("a client (%s, pid %d) %s in time; it is disconnected", *(self.client or ("?", -1)), fault)
        self.transport.abort()


def peer_of(connection: TransportSocket) -> Peer:
    """Return the process at the other end of a Unix socket."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    assert isinstance(found, bytes)
    return Peer(*_PEER.unpack(found))
