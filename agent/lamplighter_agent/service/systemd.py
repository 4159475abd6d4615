"""Messages to the service manager: one datagram to the socket that systemd names in the environment.

The protocol is public (sd_notify): lines of ``KEY=value`` in one datagram on an AF_UNIX socket; an address that
begins with ``@`` is in Linux's abstract namespace. Without the variable every call does nothing, so that the agent
runs the same in a terminal.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

logger = logging.getLogger(__name__)

_STATUS_LIMIT: Final = 200
_FIRST_FD: Final = 3
_MAX_FDS: Final = 16


def passed_sockets(environment: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the listening sockets that the service manager made for us (socket activation), or none.

    They are file descriptors from 3 on, counted in ``LISTEN_FDS`` and meant for the process ``LISTEN_PID``.
    """
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        return []
    sockets = []
    for number in range(_FIRST_FD, _FIRST_FD + min(int(count), _MAX_FDS)):
        os.set_inheritable(number, False)
        sockets.append(socket.socket(fileno=number))
    return sockets


class ServiceManager:
    """The connection to systemd, or to nothing.

    Args:
        address: Value of ``NOTIFY_SOCKET``, or None.
        watchdog_s: Seconds within which systemd wants a sign of life, or None when it does not watch.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ServiceManager:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``."""
        watchdog_s: float | None = None
        usec = environment.get("WATCHDOG_USEC", "")
        if usec.isdigit() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            watchdog_s = int(usec) / 1e6
        return cls(environment.get("NOTIFY_SOCKET") or None, watchdog_s)

    def ready(self, status: str) -> None:
        """Say that start-up is over."""
        self._send("READY=1", f"STATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._send(f"STATUS={_one_line(status)}")

    def stopping(self) -> None:
        """Say that shutdown has begun."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for at least ``seconds`` more in the present phase; must be said again before they are over."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.settimeout(1.0)
                notify.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            logger.warning("cannot notify the service manager at %r: %s", self._address, error)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_STATUS_LIMIT]
