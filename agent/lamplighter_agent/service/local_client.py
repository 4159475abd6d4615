"""Asking the running agent over its Unix socket: what the command line needs of HTTP, and no more."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.errors import ServiceError
from lamplighter_agent.service.messages import TelemetryMessage

_TIMEOUT_S: Final = 10.0
_MAX_ANSWER_BYTES: Final = 1024 * 1024


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def read_status(path: Path) -> TelemetryMessage:
    """Return the state of the agent that listens on a socket.

    Raises:
        ServiceError: If nobody listens there, the socket may not be used, or the answer is not an agent's.
    """
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        data = response.read(_MAX_ANSWER_BYTES)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ServiceError(
            f"no agent listens on {path}", hint="start it with lamplighter-agent run, or name its socket with --socket"
        ) from error
    except PermissionError as error:
        raise ServiceError(f"{path}: permission denied", hint="join the socket's group, or use sudo") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServiceError(f"{path}: the agent did not answer: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ServiceError(f"{path}: the agent answered with HTTP status {response.status}")
    try:
        return msgspec.json.decode(data, type=TelemetryMessage)
    except msgspec.DecodeError as error:
        raise ServiceError(f"{path}: not an agent's answer: {error}") from error
