"""The server of the local API: sockets, connections, start and end; ``local_api_routes`` says what is answered."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final

import uvicorn
from uvicorn.server import ServerState

from lamplighter_agent.config import LocalApiConfig
from lamplighter_agent.errors import ServiceError
from lamplighter_agent.service import unix_socket
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.credentials import read_token
from lamplighter_agent.service.local_api_gate import MAX_HEADER_BYTES, Gate
from lamplighter_agent.service.local_api_protocol import BoundedProtocol, Crowd
from lamplighter_agent.service.local_api_routes import Facts, Routes
from lamplighter_agent.service.unix_socket import BACKLOG

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S: Final = 5
_STOP_TIMEOUT_S: Final = 5


class LocalApi:
    """The server.

    Args:
        config: Sockets and limits; ``config.socket`` or ``config.tcp_port`` is set.
        requests: Takes prompts.
        facts: What is told about the agent.

    Raises:
        ConfigError: If the token of a TCP port cannot be read.
    """

    def __init__(self, config: LocalApiConfig, requests: RequestQueue, facts: Facts) -> None:
        self._config = config
        self._listeners: list[socket.socket] = []
        self._inode: int | None = None
        self._servers: list[asyncio.Server] = []
        token = None if config.tcp_port is None else read_token(config)
        # uvicorn's protocol without its Server, which would wake up ten times a second for nothing.
        self._state = ServerState()
        self._crowd = Crowd(config.max_connections)
        self._protocol = uvicorn.Config(
            Gate(Routes(requests, facts, config.max_body_bytes).application(), token),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            http=BoundedProtocol,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._protocol.load()

    def listen(self, passed: list[socket.socket] | None = None) -> None:
        """Make the sockets; clients may connect and wait from now on.

        Args:
            passed: Listening sockets from the service manager, used in place of ``config.socket``.

        Raises:
            ConfigError: If the group is unknown.
            ServiceError: If a socket is in use or cannot be made.
        """
        if passed:
            self._listeners += passed
        elif self._config.socket is not None:
            self._listeners.append(self._listen_on_path(self._config.socket))
        if self._config.tcp_port is not None:
            try:
                self._listeners.append(socket.create_server(("127.0.0.1", self._config.tcp_port)))
            except OSError as error:
                self._let_go()
                raise ServiceError(
                    f"cannot listen on the loopback's port {self._config.tcp_port}: {error.strerror}",
                    hint="choose another local_api.tcp_port",
                ) from error

    def _listen_on_path(self, path: Path) -> socket.socket:
        listener = unix_socket.listen(path, mode=int(self._config.mode, 8), group=self._config.group)
        self._inode = path.stat().st_ino
        return listener

    async def start(self) -> None:
        """Answer clients; ``listen`` came before."""
        for listener in self._listeners:
            await self._serve(listener)
        logger.info("the local API listens on %s", ", ".join(str(each.getsockname()) for each in self._listeners))

    async def _serve(self, listener: socket.socket) -> None:
        self._servers.append(
            await asyncio.get_running_loop().create_server(
                lambda: BoundedProtocol(
                    crowd=self._crowd, config=self._protocol, server_state=self._state, app_state={}
                ),
                sock=listener,
                backlog=BACKLOG,  # asyncio sets it anew
            )
        )

    @property
    def open_connections(self) -> int:
        """Connections that clients hold open."""
        return len(self._crowd)

    async def keep_reachable(self) -> None:
        """Make the socket's file anew when somebody has removed or replaced it; connections that are open stay."""
        path = self._config.socket
        if self._inode is None or path is None or not self._servers:
            return
        try:
            if path.stat().st_ino == self._inode:
                return
        except OSError:
            logger.warning("the socket's file %s is gone; it is made anew", path)
        try:
            listener = self._listen_on_path(path)
        except ServiceError as error:
            logger.error("%s", error.message)  # noqa: TRY400 (the sentence says it; tried again at the next tick)
            return
        self._listeners.append(listener)
        await self._serve(listener)

    async def stop(self) -> None:
        """Finish what is being answered, within a bound, and remove the socket that was made here."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self._state.connections):
            connection.shutdown()
        if tasks := set(self._state.tasks):
            _, late = await asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
        self._let_go()

    def _let_go(self) -> None:
        for listener in self._listeners:
            listener.close()
        if self._inode is not None and self._config.socket is not None:
            self._config.socket.unlink(missing_ok=True)
